"""Language models of transformers, which answer a request in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from gtl.backbones.place import explained, find, is_folder
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
        with explained(self.name, NEEDED):
            tokens = self._read(request, begun)
        length = tokens["input_ids"].shape[1]
        limit = getattr(self._model.config, "max_position_embeddings", None)
        if limit is not None and length + MOST_TOKENS > limit:
            raise UserError(f"{self.name}: reads {limit} tokens, and {length} with {MOST_TOKENS} of an answer are more")
        device = self._model.device
        devices = [device] if device.type == "cuda" else []
        with explained(self.name, NEEDED), torch.random.fork_rng(devices), torch.inference_mode():
            torch.manual_seed(seed)
            found = self._model.generate(
                **{name: rows.to(device) for name, rows in tokens.items()}, do_sample=True, num_beams=1,
                max_new_tokens=MOST_TOKENS, num_return_sequences=number,
                pad_token_id=self._tokenizer.pad_token_id or self._tokenizer.eos_token_id,
            )  # fmt: skip
        return [self._tokenizer.decode(row[length:], skip_special_tokens=True) for row in found]

    def _read(self, request: str, begun: str) -> Mapping[str, Any]:
        is_chat = bool(self._tokenizer.chat_template)
        if is_chat:
            turn = [{"role": "user", "content": request}]
            # As text: not every template lets an answer that was begun go on.
            before = self._tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        else:
            before = f"{request}\n"
        # A template has the tokens that a text begins with.
        tokens = self._tokenizer(before + begun, return_tensors="pt", add_special_tokens=not is_chat)
        return {name: tokens[name] for name in ("input_ids", "attention_mask")}


def find_language(spec: str) -> None:
    """Refuse what `open_language` would not find here, before anything is computed for it; no weights are read.

    Raises:
        UserError: there is no such folder or no model in it, and the hub can have none of that name.
    """
    folder = find(spec, EXPECTED)
    if is_folder(spec) and not (folder / "config.json").is_file():
        raise UserError(f"{spec}: no config.json there; {EXPECTED}")


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
