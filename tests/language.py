"""A small language model that knows one answer."""

from pathlib import Path


def make_language(folder: Path, begun: str, answer: str, chat: bool = False, ends: bool = True) -> Path:
    """Write a Mistral that goes on with an answer wherever a text ends as `begun` does.

    It has learned that by heart, behind random words, and sees no more than some words back. Without an end it says it
    again and again.
    """
    import torch
    from tokenizers import decoders
    from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

    from tests.tiny import CHAT, train_bytes

    trained = train_bytes()
    trained.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained, eos_token="</s>", model_max_length=1024, chat_template=CHAT if chat else None
    )
    end = tokenizer.eos_token_id
    config = MistralConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=1024, sliding_window=4, bos_token_id=end, eos_token_id=end,
    )  # fmt: skip
    known = tokenizer(f"{begun}{answer}{'</s>' if ends else answer}", return_tensors="pt")["input_ids"].expand(16, -1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MistralForCausalLM(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(100):
            before = torch.randint(end, (len(known), 8))
            unread = torch.full_like(before, -100)
            model(input_ids=torch.cat([before, known], 1), labels=torch.cat([unread, known], 1)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.generation_config.update(do_sample=True, temperature=0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
