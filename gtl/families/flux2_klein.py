"""FLUX.2 klein (Black Forest Labs 2026, https://bfl.ai/blog/flux2-klein-towards-interactive-visual-intelligence)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from gtl.families.flux2 import Flux2


class Flux2Klein(Flux2):
    """FLUX.2, smaller, with Qwen3 as its language model; the base models are guided as it was published."""

    name: ClassVar[str] = "flux2_klein"
    classes: Mapping[str, tuple[str, str]] = {
        **Flux2.classes, "text_encoder": ("transformers", "Qwen3ForCausalLM"),
    }  # fmt: skip
    layers: ClassVar[tuple[int, ...]] = (9, 18, 27)

    @property
    def classifier_free(self) -> bool:
        """Unless guidance was distilled into the model together with most of its steps, as its index says."""
        return not self.index.get("is_distilled", False)

    def phrase(self, prompt: str) -> str:
        """The prompt as a user's message that the assistant is about to answer without a thought."""
        chat = [{"role": "user", "content": prompt}]
        phrased: str = self.tokenizers["text_encoder"].apply_chat_template(
            chat, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        return phrased
