"""What the text encoders of a base model can read of a prompt, by their tokenizers alone: no weights are loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokens = tuple[int, ...]
VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TextEncoder:
    """The tokenizer of one text encoder, and how many tokens the encoder takes."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    max_tokens: int
    """With those that mark start and end."""

    def tokenize(self, texts: Sequence[str]) -> list[Tokens]:
        """Return the tokens of every text, without start and end and however many there are."""
        # `verbose` would warn of texts that are too long, which is what the caller wants to find out.
        rows = self.tokenizer(
            list(texts), add_special_tokens=False, padding=False, truncation=False, verbose=False
        ).input_ids
        return list(map(tuple, rows))

    def seen(self, tokens: Tokens) -> Tokens:
        """Return those of a text's tokens that reach the encoder; the others are cut off."""
        return tokens[: self.max_tokens - self.num_marks]

    def problem(self, tokens: Tokens) -> str | None:
        """Return why the encoder does not see the whole of a text; None if it does."""
        if (number := len(tokens) + self.num_marks) > self.max_tokens:
            return f"{self.name} takes {self.max_tokens} tokens of {number}"
        if not set(tokens).isdisjoint(self.tokenizer.all_special_ids):
            # An unknown character, or the text of a mark such as "<|endoftext|>".
            return f"{self.name} has no tokens for a part of it"
        return None

    @property
    def num_marks(self) -> int:
        """Number of the tokens that mark start and end."""
        return self.tokenizer.num_special_tokens_to_add()


def load_text_encoders(
    pretrained: str | Path, *, revision: str | None, max_sequence_length: int
) -> tuple[TextEncoder, ...]:
    """Load the tokenizers of a Stable Diffusion 3 pipeline: both CLIPs', and T5's where it is used.

    The pipeline cuts the text of both CLIPs where the first one's tokenizer says, and T5's at `max_sequence_length`.

    Raises:
        OSError: a tokenizer is missing, or the hub cannot be reached.
    """
    from transformers import CLIPTokenizer, T5TokenizerFast

    names = ("tokenizer", "tokenizer_2", *(("tokenizer_3",) if max_sequence_length else ()))
    for name in names:
        _require_vocabulary(Path(pretrained), name)
    clips = {name: CLIPTokenizer.from_pretrained(pretrained, subfolder=name, revision=revision) for name in names[:2]}
    longest = clips["tokenizer"].model_max_length
    encoders = [TextEncoder(name=name, tokenizer=clip, max_tokens=longest) for name, clip in clips.items()]
    if max_sequence_length:
        t5 = T5TokenizerFast.from_pretrained(pretrained, subfolder="tokenizer_3", revision=revision)
        encoders.append(TextEncoder(name="tokenizer_3", tokenizer=t5, max_tokens=max_sequence_length))
    return tuple(encoders)


def _require_vocabulary(folder: Path, name: str) -> None:
    """Refuse a folder without a tokenizer, of which transformers would make one that knows no word."""
    if folder.is_dir() and not any((folder / name / file).is_file() for file in VOCABULARIES):
        raise FileNotFoundError(f"{folder / name} holds none of {', '.join(VOCABULARIES)}")
