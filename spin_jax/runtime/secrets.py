"""Removes tokens and passwords from everything that is printed or written."""

import os
import re

# Tokens of Hugging Face, GitHub, OpenAI and services that copy its form, AWS and Google; passwords in URLs.
_SECRETS = re.compile(
    r"\b(hf_\w{8,}|gh[pousr]_\w{16,}|github_pat_\w{16,}|sk-[\w-]{16,}|AKIA[0-9A-Z]{16}|AIza[\w-]{35})"
    r"|(?<=://)[^/@\s]+(?=@)"
)


def redacted(text: str) -> str:
    """`text` without secrets: tokens of known forms, and the values of variables such as `HF_TOKEN`."""
    for name, value in os.environ.items():
        if re.search(r"(TOKEN|KEY|SECRET|PASSWORD)$", name) and len(value) >= 8:
            text = text.replace(value, f"[{name}]")
    return _SECRETS.sub("[secret]", text)
