"""How deep a parameter stands, and the factor of its learning rate."""

import pytest

from minillm.model.transformer import Transformer
from minillm.peft.config import MethodConfig
from minillm.peft.depth import depth, layer_scale
from minillm.peft.inject import inject
from tests.model.configs import small


@pytest.mark.parametrize(
    ("name", "power"),
    [
        ("embedding.weight", 4),
        ("transformer.type_embedding.weight", 4),
        ("decoder.position.embedding.weight", 4),
        ("transformer.decoder.embedding_norm.weight", 4),
        ("decoder.front.prefix", 4),
        ("decoder.blocks.0.attention.q_proj.weight", 3),
        ("decoder.blocks.2.mlp.down_proj.lora_A", 1),
        ("transformer.decoder.blocks.2.mlp_norm.weight", 1),
        ("decoder.final_norm.weight", 0),
        ("transformer.head.dense.weight", 0),
        ("head.weight", 0),
    ],
)
def test_the_rate_falls_from_the_head_to_the_embeddings(name: str, power: int) -> None:
    config = small(layers=3)
    assert layer_scale(name, config, 0.8) == pytest.approx(0.8**power, rel=1e-12)
    assert layer_scale(name, config, 1.0) == 1.0


def test_each_stack_of_an_encoder_decoder_counts_for_itself() -> None:
    config = small(shape="encoder-decoder", layers=2, decoder_layers=5)
    assert depth("encoder.blocks.1.mlp.up_proj.weight", config) == (2, 2)
    assert depth("decoder.blocks.1.mlp.up_proj.weight", config) == (2, 5)
    assert depth("encoder.position.embedding.weight", config) == (0, 2)
    assert depth("embedding.weight", config) == (0, 5)
    assert depth("encoder.final_norm.weight", config) == (3, 2)


def test_every_parameter_of_a_model_has_its_place() -> None:
    ngrams = {"ngrams": 3, "ngram_rows": 64, "ngram_dim": 4}
    norm, position = {"embedding": True}, {"kind": "learned"}
    model = Transformer(small(token_types=2, position=position, norm=norm, tied=False, speedrun=ngrams))
    inject(model, MethodConfig(method="prompt", length=2))
    places: dict[int, set[str]] = {}
    for name, _ in model.named_parameters():
        places.setdefault(depth(name, model.config)[0], set()).add(".".join(name.split(".")[:3]))
    assert places[0] == {
        "embedding.weight", "type_embedding.weight", "decoder.position.embedding", "decoder.embedding_norm.weight",
        "decoder.front.prompt", "ngram_embedding.tables.0", "ngram_embedding.tables.1",
        "ngram_embedding.project.weight",
    }  # fmt: skip
    assert places[1] == {"decoder.blocks.0"} and places[2] == {"decoder.blocks.1"}
    assert places[3] == {"decoder.final_norm.weight", "head.weight"}
