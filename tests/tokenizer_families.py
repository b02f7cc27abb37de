"""One small tokenizer of each family that language models have, built offline."""

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = ["a red square on a white background", "USER: what is in the image? ASSISTANT: a blue circle.", "system"]
CHATML = ("<|im_start|>", "<|im_end|>")


def _byte_level(special: list[str], add_prefix_space: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=special, vocab_size=330, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _sentencepiece(special: list[str], kind: str) -> Tokenizer:
    """Spaces are ▁, other characters bytes; kinds are Llama's ("prepend"), TinyLlama's ("first") and Gemma's."""
    letters = sorted({character for text in CORPUS for character in text if character != " "})
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *letters, "re", "▁a"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    merges = [("r", "e"), ("▁", "a")]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if kind == "gemma":
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
    elif kind == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return tokenizer


def _writes_bos(tokenizer: Tokenizer, bos: str):
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )


def build(family: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer of one of `FAMILIES`."""
    if family == "smollm2":
        tokenizer = _byte_level(["<|endoftext|>", *CHATML])
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>")
    if family == "chatml-as-words":  # added by hand, neither special nor exempt from the normalizer
        tokenizer = _byte_level(["<|endoftext|>"])
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.add_tokens(list(CHATML))
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    if family in ("gpt2", "prefix-space"):  # without a pad token
        tokenizer = _byte_level([], add_prefix_space=family == "prefix-space")
        tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=True)])
        names = {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    if family == "llama3":  # byte-level, with BOS
        tokenizer = _byte_level(["<|begin|>", "<|end|>"])
        _writes_bos(tokenizer, "<|begin|>")
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|end|>")
    bos, eos = ("<bos>", "<eos>") if family == "gemma" else ("<s>", "</s>")
    tokenizer = _sentencepiece(["<unk>", bos, eos], family.removeprefix("llama-"))
    if family != "llama-first":
        _writes_bos(tokenizer, bos)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token=bos, eos_token=eos)


FAMILIES = (
    "smollm2",
    "chatml-as-words",
    "gpt2",
    "prefix-space",
    "llama3",
    "gemma",
    "llama-prepend",
    "llama-first",
)
