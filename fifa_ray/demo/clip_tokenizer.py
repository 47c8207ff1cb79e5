"""A small tokenizer of CLIP's own kind, learnt from a world's prompts."""

import json

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

VOCABULARY_SIZE = 1_600
MAX_TEXT_TOKENS = 77  # CLIP's, at which scorers truncate
START, END = "<|startoftext|>", "<|endoftext|>"


def train_tokenizer(prompts: list[str], vocabulary_size: int = VOCABULARY_SIZE) -> CLIPTokenizer:
    """A byte-level BPE like CLIP's: all bytes, all bytes that end a word, and learnt merges."""
    learner = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), "removed", True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner.train_from_iterator(
        sorted(set(prompts)),
        trainers.BpeTrainer(
            vocab_size=vocabulary_size,
            initial_alphabet=alphabet,
            end_of_word_suffix="</w>",
            min_frequency=3,
            show_progress=False,
        ),
    )
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    tokens += [first + second for first, second in merges]
    tokens = [*dict.fromkeys(tokens), START, END]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=merges,  # type: ignore[arg-type]  # pairs, as the tokenizers library has them
        model_max_length=MAX_TEXT_TOKENS,
    )
