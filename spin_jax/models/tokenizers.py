"""Loads tokenizers of checkpoints, checks them against the model's vocabulary, and saves them."""

import json
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

from etils import epath
from tokenizers import Tokenizer

from spin_jax.models.architecture import ModelConfig
from spin_jax.storage import files

# What tokenizers do differently: spaces, line ends, digits, accents, scripts, code.
_TEXTS = (
    "Two  words,\n\n and a\ttab\r\n",
    " don't: 12345 or 3.14 I'LL  ",
    "é e\u0301 ñ ﬁ Ａ\u00a0\u200b 你好 😀",
    "  def f(x):\n    return x",
)


def load_tokenizer(path: epath.PathLike, chat_template: str | None = None, notes: list[str] | None = None) -> Any:
    """Loads the fast tokenizer in a directory, which follows tokenizer.json.

    The errors name the directory, or its damaged file. `notes` get a sentence where transformers would not follow it.
    """
    from transformers import AutoTokenizer

    directory = Path(path)
    if not directory.is_dir():
        raise FileNotFoundError(f"tokenizer {str(path)!r}: no such directory")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        if (directory / "tokenizer.json").exists():
            tokenizer = _follow_file(tokenizer, directory, [] if notes is None else notes)
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
    beside = directory / "chat_template.json"  # transformers gives it to processors of text and images only
    if chat_template is None and tokenizer.chat_template is None and beside.exists():
        chat_template = str(beside)
    return with_chat_template(tokenizer, chat_template)


def _follow_file(tokenizer: Any, directory: Path, notes: list[str]) -> Any:
    """The tokenizer, or one made of tokenizer.json alone where the two differ.

    transformers 5 often takes from the file only the vocabulary, and the rules for spaces, digits and accents from
    the class that tokenizer_config.json or the model type names.
    """
    from transformers import PreTrainedTokenizerFast

    own = PreTrainedTokenizerFast.from_pretrained(directory)  # it also adds the tokens of tokenizer_config.json
    if tokenizer.is_fast:
        added = [str(token) for token in own.added_tokens_decoder.values()]
        texts = [*_TEXTS, *(f"a {token} b{token}\n{token}" for token in [*added[:16], *added[16:][-16:]])]
        differing = [text for text in texts if _pieces(tokenizer, text) != _pieces(own, text)]
        if not differing and tokenizer.get_added_vocab() == own.get_added_vocab():
            return tokenizer
        example = f", for example for {differing[0]!r}" if differing else ""
        notes.append(
            f"{directory}: transformers' {type(tokenizer).__name__} makes other tokens than tokenizer.json{example}. "
            "Here tokenizer.json counts; check that the software that trained and serves this model does the same"
        )
    vocabulary = own.get_vocab()
    for name, token in tokenizer.special_tokens_map.items():  # the class may know those that no file names
        if getattr(own, name, None) is None and isinstance(token, str) and token in vocabulary:
            setattr(own, name, token)
    return own


def _pieces(tokenizer: Any, text: str) -> tuple[list[int], str]:
    """A text's ids, and the text that they are."""
    ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    return ids, tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False)


def with_chat_template(tokenizer: Any, chat_template: str | None) -> Any:
    """Sets the chat template: Jinja text, or the path of a file with it; None keeps the tokenizer's own.

    A file that ends in .json has the text under the key chat_template.
    """
    if chat_template is None:
        return tokenizer
    if "{" not in chat_template:  # Jinja text would have one
        try:
            path = Path(chat_template)
            is_json = path.suffix == ".json"
            text = files.read_object(path).get("chat_template") if is_json else path.read_text(encoding="utf-8")
            if not isinstance(text, str):
                raise ValueError("it has no text under the key chat_template")
        except (OSError, ValueError) as error:
            raise ValueError(f"chat_template {chat_template!r} is no Jinja text, nor a file of it: {error}") from error
        chat_template = text
    tokenizer.chat_template = chat_template
    return tokenizer


def check_vocabulary(tokenizer: Any, config: ModelConfig, path: epath.PathLike, notes: list[str] | None = None) -> None:
    """Raises ValueError where the tokenizer has ids without a row in the embedding.

    A padding token without one is taken out of the tokenizer, which a note says: it was never trained.
    """
    beyond = {token: id for token, id in tokenizer.get_vocab().items() if id >= config.vocab_size}
    if not tokenizer.get_vocab():
        raise ValueError(f"{path}: the tokenizer's vocabulary is empty")
    if not beyond:
        return
    pad, templates = tokenizer.pad_token, str(tokenizer.chat_template)
    used = {str(token) for name, token in tokenizer.special_tokens_map.items() if name != "pad_token"}
    used |= {token for token in beyond if token in templates or (token == pad and "pad_token" in templates)}
    padding = {token for token in tokenizer.get_added_vocab() if token == pad or "pad" in token.lower()}
    if not beyond.keys() <= padding - used:
        rows = f"{config.vocab_size} rows (vocab_size)"
        raise ValueError(f"{path}: the tokenizer's largest id is {max(beyond.values())} and the embedding has {rows}")
    _remove(tokenizer, beyond)
    if notes is not None:
        notes.append(
            f"{path}: the embedding has no row for {', '.join(sorted(beyond))}. Padding was never trained: it is left "
            "out of the tokenizer and of exports, and is plain text where a text has it"
        )


def _remove(tokenizer: Any, tokens: Collection[str]) -> None:
    """Takes added tokens, the padding token perhaps among them, out of a tokenizer."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["added_tokens"] = [entry for entry in backend["added_tokens"] if entry["content"] not in tokens]
    backend["padding"] = None
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(backend))
    if tokenizer.pad_token in tokens:
        tokenizer.pad_token = None


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
