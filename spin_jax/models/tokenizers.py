"""Loads tokenizers of checkpoints, checks them against the model's vocabulary, and saves them."""

import tempfile
from pathlib import Path
from typing import Any

from etils import epath

from spin_jax.models.architecture import ModelConfig
from spin_jax.storage import files


def load_tokenizer(path: epath.PathLike, chat_template: str | None = None) -> Any:
    """Loads the fast tokenizer in a directory; the errors name the directory, or its damaged file."""
    from transformers import AutoTokenizer

    directory = Path(path)
    if not directory.is_dir():
        raise FileNotFoundError(f"tokenizer {str(path)!r}: no such directory")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # JSON errors, errors of `tokenizers`, and others that odd values cause
        for file in sorted(directory.glob("*.json")):
            files.read_object(file)  # raises the better error where the file is damaged
        absent = "" if (directory / "tokenizer.json").exists() else "no tokenizer.json, and "
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise ValueError(
            f"{path}: {absent}transformers cannot load the tokenizer ({reason}). Take tokenizer.json and "
            "tokenizer_config.json as the model's authors published them"
        ) from error
    if not tokenizer.is_fast:
        raise ValueError(f"{path}: this tokenizer has no tokenizer.json (a fast tokenizer is needed)")
    if not isinstance(tokenizer.chat_template, str | dict | None):
        raise ValueError(f"{path}: chat_template is {tokenizer.chat_template!r}, and should be Jinja text")
    return with_chat_template(tokenizer, chat_template)


def with_chat_template(tokenizer: Any, chat_template: str | None) -> Any:
    """Sets the chat template: Jinja text, or the path of a file with it; None keeps the tokenizer's own."""
    if chat_template is None:
        return tokenizer
    if "{" not in chat_template:  # Jinja text would have one
        try:
            chat_template = Path(chat_template).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ValueError(f"chat_template {chat_template!r} is no Jinja text, nor a file of it: {error}") from error
    tokenizer.chat_template = chat_template
    return tokenizer


def check_vocabulary(tokenizer: Any, config: ModelConfig, path: epath.PathLike) -> None:
    """Raises ValueError where the tokenizer has ids without a row in the embedding."""
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest < 0:
        raise ValueError(f"{path}: the tokenizer's vocabulary is empty")
    if largest >= config.vocab_size:
        rows = f"{config.vocab_size} rows (vocab_size)"
        raise ValueError(f"{path}: the tokenizer's largest id is {largest} and the embedding has {rows}")


def save_tokenizer(tokenizer: Any, directory: epath.Path) -> None:
    """Writes a tokenizer's files so that software made for transformers 4, such as vLLM, can read them too.

    transformers 4 has other names for the class and for additional special tokens, and expects chat templates
    in tokenizer_config.json. transformers 5 reads both forms.
    """
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        path = Path(scratch) / "tokenizer_config.json"
        config = files.read_object(path)
        if config.get("tokenizer_class") == "TokenizersBackend":
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
        if isinstance(config.get("extra_special_tokens"), list):
            config["additional_special_tokens"] = config.pop("extra_special_tokens")
        template = tokenizer.chat_template
        if isinstance(template, dict):
            template = [{"name": name, "template": text} for name, text in template.items()]
        if template:
            config["chat_template"] = template
        path.write_bytes(files.as_json(config))
        for path in sorted(path for path in Path(scratch).rglob("*") if path.is_file()):
            files.write(directory / path.relative_to(scratch), path.read_bytes())
