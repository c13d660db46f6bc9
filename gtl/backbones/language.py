"""Language models of transformers, which answer a request in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from gtl.backbones.place import explained, reason, source_of
from gtl.imports import light, quieted
from gtl.types import UserError

if TYPE_CHECKING:
    from typing_extensions import Self

MOST_TOKENS = 192
"""Of an answer."""
NEEDED = "a language model of transformers, with its tokenizer"
EXPECTED = "expected a folder or hub id of a language model of transformers"


class Language:
    """A causal language model, as it is published: nothing of it is trained here."""

    def __init__(self, name: str, model: Any, tokenizer: Any) -> None:
        """`model` and `tokenizer` are transformers'."""
        self.name, self._model, self._tokenizer = name, model.eval(), tokenizer

    def to(self, device: str) -> Self:
        """This model, moved to a device.

        Raises:
            UserError: there is no room for it.
        """
        with self._answering():
            self._model.to(device)
        return self

    def reads(self, request: str, begun: str) -> bool:
        """Whether it has room for a request and an answer.

        Raises:
            UserError: its tokenizer fails.
        """
        return self._has_room(self._read(request, begun))

    def answers(self, request: str, begun: str, number: int, seed: int = 0) -> list[str]:
        """Some answers that go on where one was begun, sampled as the model's own settings say.

        A model that was taught to converse is asked as its chat template says, any other one continues the text. The
        same seed gives the same words. A line that was cut off by MOST_TOKENS is left out.

        Raises:
            UserError: the model does not read so much, or cannot answer with its settings, weights or memory.
        """
        tokens = self._read(request, begun)
        if not self._has_room(tokens):
            raise UserError(f"{self.name}: reads too few tokens for what it is asked")
        device, pad = self._model.device, self._tokenizer.pad_token_id
        devices = [device] if device.type == "cuda" else []
        with self._answering(), torch.random.fork_rng(devices), torch.inference_mode():
            torch.manual_seed(seed)
            found = self._model.generate(
                **{name: rows.to(device) for name, rows in tokens.items()}, do_sample=True, num_beams=1,
                max_new_tokens=MOST_TOKENS, num_return_sequences=number,
                pad_token_id=self._tokenizer.eos_token_id if pad is None else pad,
            )  # fmt: skip
        texts = []
        for row in found[:, tokens["input_ids"].shape[1] :]:
            text = self._tokenizer.decode(row, skip_special_tokens=True)
            ended = bool(torch.isin(row, torch.tensor(self._tokenizer.all_special_ids, device=device)).any())
            texts.append(text if ended else text.rpartition("\n")[0])
        return texts

    def _read(self, request: str, begun: str) -> Mapping[str, Any]:
        is_chat = bool(self._tokenizer.chat_template)
        with self._answering():
            if is_chat:
                turn = [{"role": "user", "content": request}]
                # As text: not every template lets an answer that was begun go on.
                before = self._tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
            else:
                before = f"{request}\n"
            # A template has the tokens that a text begins with.
            tokens = self._tokenizer(before + begun, return_tensors="pt", add_special_tokens=not is_chat)
        return {name: tokens[name] for name in ("input_ids", "attention_mask")}

    def _has_room(self, tokens: Mapping[str, Any]) -> bool:
        limit = getattr(self._model.config, "max_position_embeddings", None)
        return limit is None or tokens["input_ids"].shape[1] + MOST_TOKENS <= limit

    @contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # what the model's own template, settings and weights may raise is nearly anything
            raise UserError(f"{self.name}: cannot answer: {reason(error)}") from error


def check_language(spec: str) -> None:
    """Refuse what `open_language` would, as far as its configs and its tokenizer tell; no weights are read.

    Raises:
        UserError: there is no such model, it does not write, or its files are damaged.
    """
    _open_tokenizer(spec, source_of(spec, EXPECTED))


def open_language(spec: str) -> Language:
    """A model of a local folder or of the hub, on the CPU.

    Args:
        spec: A folder or hub id of what transformers' AutoModelForCausalLM opens: Qwen, Llama, SmolLM, GPT-2, ...

    Raises:
        UserError: there is no such model, it does not write, or its files are damaged or incomplete.
    """
    source = source_of(spec, EXPECTED)
    tokenizer = _open_tokenizer(spec, source)
    from transformers import AutoModelForCausalLM

    with explained(spec, NEEDED), quieted():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype="auto", trust_remote_code=False, output_loading_info=True
        )
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{spec}: {len(missing)} of the model's weights are missing, the first is {missing[0]}")
    return Language(spec, model, tokenizer)


def _open_tokenizer(spec: str, source: str) -> Any:
    """The tokenizer of a model that writes, as its config says."""
    with light():
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoTokenizer

    with explained(spec, NEEDED), quieted():
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"{spec}: a {config.model_type}, which does not write; {EXPECTED}")
    return tokenizer
