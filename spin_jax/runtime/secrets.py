"""Takes tokens and passwords out of everything that is printed or written."""

import os
import re

# Tokens of Hugging Face, GitHub, OpenAI and its like, AWS and Google; passwords in URLs.
_SECRETS = re.compile(
    r"\b(hf_\w{8,}|gh[pousr]_\w{16,}|github_pat_\w{16,}|sk-[\w-]{16,}|AKIA[0-9A-Z]{16}|AIza[\w-]{35})"
    r"|(?<=://)[^/@\s]+(?=@)"
)


def redacted(text: str) -> str:
    """`text` without secrets: of known forms, or from environment variables that are named like one."""
    for name, value in os.environ.items():
        if re.search(r"(TOKEN|KEY|SECRET|PASSWORD)$", name) and len(value) >= 8:
            text = text.replace(value, f"[{name}]")
    return _SECRETS.sub("[secret]", text)
