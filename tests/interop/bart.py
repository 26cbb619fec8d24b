"""A folder of BART's as Transformers writes it: random weights, byte-level BPE, and the way its decoder begins."""

from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from tests.interop.ours import TEXT
from tests.interop.theirs import make, save

SPECIAL = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>"}
BOS, PAD, EOS = 0, 1, 2


def bart_in(folder: Path) -> tuple[Any, Any]:
    """(model, tokenizer) of Transformers', both saved in `folder`; `<s>` is forced behind the `</s>` that begins."""
    import transformers

    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = list(SPECIAL.values())
    library.train_from_iterator(
        TEXT * 3,
        trainers.BpeTrainer(vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    library.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    auto = transformers.PreTrainedTokenizerFast(tokenizer_object=library, **SPECIAL)
    auto.save_pretrained(folder)
    sizes = {"vocab_size": len(auto), "max_position_embeddings": 48, "tie_word_embeddings": False}
    theirs = make("bart", "BartForConditionalGeneration", **sizes)
    with torch.no_grad():
        theirs.model.decoder.embed_positions.weight *= 5.0  # else a random model says one token again and again
    theirs.final_logits_bias[:] = 0.0
    theirs.final_logits_bias[0, [BOS, PAD, 3, 4]] = -30.0  # as a trained one, it says no special token inside a text
    theirs.final_logits_bias[0, EOS] = 2.0  # but ends some
    theirs.generation_config.forced_bos_token_id = BOS
    theirs.generation_config.forced_eos_token_id = None
    save(theirs, folder)
    return theirs, auto


def written(theirs: Any, auto: Any, texts: list[str], tokens: int, **options: Any) -> list[list[int]]:
    """What Transformers writes for a padded batch of `texts`, behind the two ids that its decoder begins with."""
    read = auto(texts, padding=True, return_tensors="pt")
    inputs = {"input_ids": read["input_ids"], "attention_mask": read["attention_mask"]}
    made = theirs.generate(**inputs, max_new_tokens=tokens + 1, do_sample=False, **options)
    assert made[:, :2].eq(torch.tensor([EOS, BOS])).all()
    return [row[: row.index(EOS)] if EOS in row else row for row in made[:, 2:].tolist()]
