"""Language models of transformers, which answer a request in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from gtl.backbones.place import explained, find
from gtl.imports import light, quieted
from gtl.types import UserError

if TYPE_CHECKING:
    from typing_extensions import Self

MOST_TOKENS = 128
"""Of an answer."""
NEEDED = "a language model of transformers, with its tokenizer"
EXPECTED = "expected a folder or hub id of a language model of transformers"


class Language:
    """A causal language model, as it is published: nothing of it is trained here."""

    def __init__(self, name: str, model: Any, tokenizer: Any) -> None:
        """`model` and `tokenizer` are transformers'."""
        self.name, self._model, self._tokenizer = name, model.eval(), tokenizer

    def to(self, device: str) -> Self:
        """This model, moved to a device."""
        self._model.to(device)
        return self

    def answers(self, request: str, begun: str, number: int, seed: int = 0) -> list[str]:
        """Some answers that go on where one was begun, sampled as the model's own settings say.

        A model that was taught to converse is asked as its chat template says, any other one continues the text. The
        same seed gives the same words.

        Raises:
            UserError: the model does not read so much.
        """
        tokens = self._read(request, begun)
        length = tokens["input_ids"].shape[1]
        limit = getattr(self._model.config, "max_position_embeddings", None)
        if limit is not None and length + MOST_TOKENS > limit:
            raise UserError(f"{self.name}: reads {limit} tokens, and {length} with {MOST_TOKENS} of an answer are more")
        device = self._model.device
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.inference_mode():
            torch.manual_seed(seed)
            found = self._model.generate(
                **{name: rows.to(device) for name, rows in tokens.items()}, do_sample=True, max_new_tokens=MOST_TOKENS,
                num_return_sequences=number, pad_token_id=self._tokenizer.pad_token_id or self._tokenizer.eos_token_id,
            )  # fmt: skip
        return [self._tokenizer.decode(row[length:], skip_special_tokens=True) for row in found]

    def _read(self, request: str, begun: str) -> Mapping[str, Any]:
        if not self._tokenizer.chat_template:
            text = f"{request}\n{begun}"
            return dict(self._tokenizer(text, return_tensors="pt", return_token_type_ids=False))
        turns = [{"role": "user", "content": request}, {"role": "assistant", "content": begun}]
        return dict(self._tokenizer.apply_chat_template(
            turns, continue_final_message=True, return_tensors="pt", return_dict=True,
        ))  # fmt: skip


def find_language(spec: str) -> None:
    """Refuse what `open_language` would not find here, before anything is computed for it; nothing is read.

    Raises:
        UserError: there is no such folder, and the hub can have no model of that name.
    """
    find(spec, EXPECTED)


def open_language(spec: str) -> Language:
    """A model of a local folder or of the hub, on the CPU.

    Args:
        spec: A folder or hub id of what transformers' AutoModelForCausalLM opens: Qwen, Llama, SmolLM, GPT-2, ...

    Raises:
        UserError: there is no such model, it does not write, or its files are damaged or incomplete.
    """
    path = find(spec, EXPECTED)
    with light():
        from transformers import AutoModelForCausalLM, AutoTokenizer

    source = str(path) if path.is_dir() else spec
    with explained(spec, NEEDED), quieted():
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype="auto", trust_remote_code=False, output_loading_info=True
        )
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{spec}: {len(missing)} of the model's weights are missing, the first is {missing[0]}")
    return Language(spec, model, tokenizer)
