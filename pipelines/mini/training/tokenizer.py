"""Stage `tokenizer`: a small byte-level BPE tokenizer of the captions."""

from pathlib import Path

import numpy as np
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from vdit_sparse.pipelines.mini.training.captions import sample_spec
from vdit_sparse.pipelines.mini.training.checkpoints import name_tokenizer_class
from vdit_sparse.pipelines.mini.training.pacing import report

SPECIAL_TOKENS = ["<pad>", "</s>", "<unk>"]


def train_tokenizer(folder: Path, captions: int, vocabulary: int) -> PreTrainedTokenizerFast:
    """Trains on sampled captions, saves to `folder` and returns the tokenizer.

    Text is normalised (NFKC) and lower-cased; every byte has a token, so any text can be written;
    `</s>` ends every text, as in T5.

    Args:
        folder: gets `tokenizer.json` and `tokenizer_config.json`.
        captions: captions to train on.
        vocabulary: number of tokens, at least 259 (256 bytes and 3 special tokens).
    """
    random = np.random.default_rng(0)
    texts = [sample_spec(random).caption for _ in range(captions)]
    model = _train(texts, vocabulary)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
        padding_side="right",
    )
    tokenizer.save_pretrained(folder)
    name_tokenizer_class(folder / "tokenizer_config.json")
    lengths = [len(tokens) for tokens in tokenizer(texts[:2000]).input_ids]
    report(
        f"tokenizer of {model.get_vocab_size()} entries in {folder}; a caption has "
        f"{np.mean(lengths):.1f} tokens on average, {max(lengths)} at most"
    )
    return tokenizer


def _train(texts: list[str], vocabulary: int) -> Tokenizer:
    model = Tokenizer(models.BPE())
    model.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    model.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", SPECIAL_TOKENS.index("</s>"))]
    )
    return model
