"""What latent transformers share whose prompts a language model reads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

from gtl.families.base import Conditions
from gtl.families.latent import TEXT_ENCODER, ids_of, unstack
from gtl.families.latent_transformer import LatentTransformer, equal_steps

if TYPE_CHECKING:
    from torch import Tensor, nn

STATES = "encoder_hidden_states"
STATES_MASK = f"{STATES}_mask"
ATTENTION_MASK = "attention_mask"


class LanguageTransformer(LatentTransformer, ABC):
    """A latent transformer with one text encoder, a language model that was made to chat.

    The model reads a prompt in the form of its chats, and the transformer reads the model's hidden states.
    """

    companions: ClassVar[Mapping[str, str]] = {TEXT_ENCODER: "tokenizer"}
    token_limits: ClassVar[Mapping[str, int]] = {TEXT_ENCODER: 512}
    reads_padding: ClassVar[bool] = False
    """Whether the transformer reads the states of padding like those of the prompt."""
    num_dropped: ClassVar[int] = 0
    """First tokens whose states the transformer does not read."""

    @abstractmethod
    def phrase(self, prompt: str) -> str:
        """The prompt in the form of a chat."""

    @abstractmethod
    def select(self, hidden_states: Sequence[Tensor]) -> Tensor:
        """What the transformer reads, [B, tokens, D], of the states in front of the layers and behind each of them."""

    def tokenize(self, prompts: Sequence[str]) -> list[dict[str, Tensor]]:
        """`input_ids` and `attention_mask` [tokens] of each prompt, cut and padded."""
        phrases = [self.phrase(prompt) for prompt in prompts]
        read = self._read(TEXT_ENCODER, phrases, add_special_tokens=False)  # they are in the phrases
        return unstack({name: read[name] for name in (ids_of(TEXT_ENCODER), ATTENTION_MASK)})

    def encode_tokens(self, encoders: Mapping[str, nn.Module], tokens: Mapping[str, Tensor]) -> Conditions:
        """Selected hidden states, [B, tokens, D], of the longest prompt's length; see `collate`."""
        return self.collate(self._encode(encoders, tokens))

    def encode_prompts(self, encoders: Mapping[str, nn.Module], prompts: Sequence[str]) -> list[Conditions]:
        """Selected hidden states of each prompt, [tokens, D], each as long as it is."""
        return self._encode(encoders, self.collate(self.tokenize(prompts)))

    def _encode(self, encoders: Mapping[str, nn.Module], tokens: Mapping[str, Tensor]) -> list[Conditions]:
        encoder = cast(Any, encoders[TEXT_ENCODER])
        ids, mask = (tokens[name].to(encoder.device) for name in (ids_of(TEXT_ENCODER), ATTENTION_MASK))
        if not self.reads_padding:
            needed = mask.any(0)
            ids, mask = ids[:, needed], mask[:, needed]
        # Without the head that makes words of the last states: nobody reads those.
        output = encoder.base_model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
        states = self.select(output.hidden_states)
        if self.reads_padding:
            return [{STATES: each} for each in states]
        return [{STATES: each[kept][self.num_dropped :]} for each, kept in zip(states, mask.bool(), strict=True)]

    def collate(self, conditions: Sequence[Conditions]) -> Conditions:
        """Batch conditions of samples, [B, ...], the shorter prompts filled up with zeros.

        Where they are, `encoder_hidden_states_mask` [B, tokens] is False; it is left out where all are equally long.
        """
        import torch
        from torch.nn.utils.rnn import pad_sequence

        if STATES not in conditions[0]:  # tokens, or what else there is where the text encoder runs in training
            return super().collate(conditions)
        states = [sample[STATES] for sample in conditions]
        batch = super().collate([{k: v for k, v in sample.items() if k != STATES} for sample in conditions])
        batch[STATES] = pad_sequence(states, batch_first=True)
        lengths = [len(each) for each in states]
        if min(lengths) < max(lengths):
            places = torch.arange(max(lengths), device=states[0].device)
            batch[STATES_MASK] = places < torch.tensor(lengths, device=places.device)[:, None]
        return batch

    def sampler_options(self, steps: int) -> dict[str, Any]:
        """The shares of the way to noise."""
        return {"sigmas": equal_steps(steps)}
