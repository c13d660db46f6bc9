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
IDS = ids_of(TEXT_ENCODER)
ATTENTION_MASK = "attention_mask"


class LanguageTransformer(LatentTransformer, ABC):
    """A latent transformer with one text encoder, a language model that was made to chat.

    The model reads a prompt in the form of its chats, and the transformer reads the model's hidden states.
    """

    companions: ClassVar[Mapping[str, str]] = {TEXT_ENCODER: "tokenizer"}
    token_limits: Mapping[str, int] = {TEXT_ENCODER: 512}
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
        """`input_ids` and `attention_mask` [tokens] of each prompt, cut and padded; see `collate`."""
        phrases = [self.phrase(prompt) for prompt in prompts]
        side = {} if self.reads_padding else {"padding_side": "right"}
        read = self._read(TEXT_ENCODER, phrases, add_special_tokens=False, **side)  # they are in the phrases
        return unstack({name: read[name] for name in (IDS, ATTENTION_MASK)})

    def encode_tokens(self, encoders: Mapping[str, nn.Module], tokens: Mapping[str, Tensor]) -> Conditions:
        """Selected hidden states, [B, tokens, D], and where prompts are padded their mask; see `collate`."""
        encoder = cast(Any, encoders[TEXT_ENCODER])
        given = {name: value.to(encoder.device) for name, value in tokens.items()}
        # Without the head that makes words of the last states: nobody reads those.
        output = encoder.base_model(**given, output_hidden_states=True, use_cache=False)
        # Of an encoder that is spread over several devices each layer's are on its own.
        states = self.select([each.to(encoder.device) for each in output.hidden_states])[:, self.num_dropped :]
        if self.reads_padding or ATTENTION_MASK not in given:
            return {STATES: states}
        mask = given[ATTENTION_MASK][:, self.num_dropped :].bool()
        return {STATES: states * mask[..., None], STATES_MASK: mask}

    def encode_prompts(self, encoders: Mapping[str, nn.Module], prompts: Sequence[str]) -> list[Conditions]:
        """Selected hidden states of each prompt, [tokens, D], each as long as it is."""
        samples = super().encode_prompts(encoders, prompts)
        return [
            {STATES: sample[STATES][sample[STATES_MASK]]} if STATES_MASK in sample else sample for sample in samples
        ]

    def collate(self, conditions: Sequence[Conditions]) -> Conditions:
        """Batch conditions or tokens of samples, [B, ...], as long as the longest prompt; others are filled up.

        `encoder_hidden_states_mask`, or `attention_mask`, [B, tokens] says where they are. It is left out where all
        prompts are equally long, so that nothing that reads a batch of them depends on more than its shape.
        """
        if STATES in conditions[0]:
            return self._collate_states(conditions)
        batch = super().collate(conditions)
        if self.reads_padding or ATTENTION_MASK not in batch:
            return batch
        mask = batch.pop(ATTENTION_MASK)
        needed = int(mask.sum(1).max())
        batch[IDS] = batch[IDS][:, :needed]
        return batch if mask[:, :needed].all() else {**batch, ATTENTION_MASK: mask[:, :needed]}

    def _collate_states(self, conditions: Sequence[Conditions]) -> Conditions:
        import torch
        from torch.nn.utils.rnn import pad_sequence

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
