"""The published checkpoints' keys and shapes, rebuilt on the meta device, against what is known of the files.

modelscope/DiffSynth-Studio (model_configs.py, commit fed7b18f) knows the files by the md5 of their keys and shapes; the
sha256 here are of lists with those md5.
"""

import hashlib

import pytest
import tiny_rewards
import torch
import transformers
from bench_rewards import qwen2vl_config

import rewards


def digest(state):
    """(number of tensors, start of the sha256 of "key [shape]" lines) of {key: tensor}."""
    lines = "\n".join(f"{key} {list(state[key].shape)}" for key in sorted(state))
    return len(state), hashlib.sha256(lines.encode()).hexdigest()[:16]


def meta_state(cls, config, **options):
    with torch.device("meta"):
        return cls(config, **options).state_dict()


def position_ids(*names):
    """What older files hold beside the weights: 0, 1, 2, ... as [1, length]."""
    return {name: torch.empty(1, length, device="meta") for name, length in names}


def hpsv2():
    return tiny_rewards.open_clip_state(rewards.HPSv2.CONFIG)


def imagereward():
    return tiny_rewards.imagereward_state(rewards.ImageReward.VISION, rewards.ImageReward.TEXT, projection=256)


def hpsv3():
    state = tiny_rewards.qwen2vl_keys(meta_state(transformers.Qwen2VLForConditionalGeneration, qwen2vl_config()))
    return state | tiny_rewards.head_state("rm_head.", (3584, 1024, 16, 2), (0, 3, 5))


def clip_h():
    state = meta_state(transformers.CLIPModel, transformers.CLIPConfig(**rewards.HPSv2.CONFIG))
    names = ("text_model.embeddings.position_ids", 77), ("vision_model.embeddings.position_ids", 257)
    return state | position_ids(*names)


PUBLISHED = {  # what our side makes of the file -> (tensors, start of the sha256)
    hpsv2: (686, "2d21a943bdca7a55"),  # HPS_v2.1_compressed.pt
    hpsv3: (736, "71385686a70d1eff"),  # HPSv3.safetensors
    imagereward: (625, "b483298b77da9ee3"),  # ImageReward.pt
    clip_h: (912, "3e7dfbae763da2a8"),  # PickScore
}


@pytest.mark.parametrize("state", PUBLISHED)
def test_keys_and_shapes_are_the_published_ones(state):
    with torch.device("meta"):
        assert digest(state()) == PUBLISHED[state]


class PublishedWeights(rewards.Weights):
    """The published keys in place of the files; the networks they must fit are built on the meta device."""

    def open(self, cls, folder, size=None):
        return qwen2vl_config() if cls is transformers.Qwen2VLConfig else self

    def add_special_tokens(self, _):
        """This is the tokenizer too."""

    def convert_tokens_to_ids(self, token):
        return 151657

    def state(self, folder, name):
        with torch.device("meta"):
            return {"hpsv2": hpsv2, "hpsv3": hpsv3, "imagereward": imagereward}[folder]()

    def model(self, cls, folder, config=None, state=None, dtype=None, **options):
        config = config or transformers.CLIPConfig(**rewards.HPSv2.CONFIG)
        with torch.device("meta"):
            model = cls(config, **options)
        if state is None:  # transformers leaves out what older files hold beside the weights
            state = {key: value for key, value in clip_h().items() if "position_ids" not in key}
        shapes = [{key: list(value.shape) for key, value in s.items()} for s in (model.state_dict(), state)]
        assert shapes[0] == shapes[1]
        self.fitted = [*getattr(self, "fitted", []), cls.__name__]
        return model


@pytest.mark.parametrize(
    "name, networks",
    (
        ("hpsv2", ["CLIPModel"]),
        ("hpsv3", ["Qwen2VLModel"]),
        ("imagereward", ["BlipVisionModel", "BlipTextModel"]),
        ("pickscore", ["CLIPModel"]),
    ),
)
def test_every_published_key_finds_its_place(name, networks):
    """Nothing missing, nothing left over, after the scorers' own renaming; the heads are fitted by load_head."""
    weights = PublishedWeights()
    rewards.SCORERS[name](weights, "cpu")
    assert weights.fitted == networks


def test_numbers_that_no_key_shows():
    clip, vision = transformers.CLIPConfig(**rewards.HPSv2.CONFIG), rewards.ImageReward.VISION
    assert clip.vision_config.hidden_act == clip.text_config.hidden_act == "gelu"  # OpenAI's models: quick_gelu
    assert vision["layer_norm_eps"] == 1e-6 and rewards.ImageReward.TEXT["layer_norm_eps"] == 1e-12
