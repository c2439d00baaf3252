"""The small HRM-Text that the models' tests share."""

from fastattn.models import HrmTextConfig

OPTIONS = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
# heads that together are narrower than the state: a width taken for the other shows
NARROW_HEADS = {"hidden_size": 24, "intermediate_size": 36, "head_dim": 8}


def config(**changes) -> HrmTextConfig:
    return HrmTextConfig(**OPTIONS | changes)
