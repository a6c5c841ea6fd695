"""Text from a model, streamed to the terminal."""

from efficientllm.models.load import load_config, load_model, load_tokenizer


def generate_text(
    model: str, prompt: str, *, max_new_tokens: int, temperature: float, seed: int, trust_remote_code: bool
) -> int:
    """Prints the prompt and what the model makes of it, token by token; temperature 0 takes the likeliest.

    Raises:
        UnsupportedModelError: the model or its tokenizer cannot be loaded.
    """
    import torch
    from transformers import TextStreamer

    load_config(model, trust_remote_code)  # says what is wrong with a folder better than its tokenizer does
    tokenizer = load_tokenizer(model, trust_remote_code)
    loaded = load_model(model, trust_remote_code=trust_remote_code)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded.to(device)
    torch.manual_seed(seed)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].long()
    if not ids.numel():  # an empty prompt, and no BOS that the tokenizer adds
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        ids = torch.tensor([[start or 0]])
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    loaded.generate(
        ids.to(device),
        attention_mask=torch.ones_like(ids).to(device),
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.eos_token_id,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        **sampling,
    )
    return 0
