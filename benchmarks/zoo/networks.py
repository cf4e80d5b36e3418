"""Which networks there are to try, how many parameters they have, and which images they take."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torchvision
from torch import nn

from dist_train.config.importing import import_callable

NUM_CLASSES = 10
LARGEST = 150_000_000  # parameters of a network that is run
SIDES = (64, 96, 128, 160, 192, 224, 256, 299)  # of square images: the first that fits
# Last, as what is special about them is told elsewhere: auxiliary logits, versions of states.
LAST = ("googlenet", "inception_v3", "mnasnet0_5", "mnasnet0_75", "mnasnet1_0", "mnasnet1_3")
# Among the smallest of each of timm's files, those that take longest at the end.
# fmt: off
TIMM = (
    "botnet26t_256", "caformer_s18", "cait_xxs24_224", "coat_lite_tiny", "coat_tiny",
    "coatnet_nano_rw_224", "convit_tiny", "convmixer_768_32", "convnext_atto", "convnextv2_atto",
    "cpubone_nano", "crossvit_tiny_240", "cs3darknet_focus_s", "csatv2", "cspnext_tiny",
    "darknet21", "davit_tiny", "deit_tiny_distilled_patch16_224", "deit_tiny_patch16_224",
    "densenetblur121d", "dla46_c", "dm_nfnet_f0", "dpn48b", "edgenext_xx_small",
    "efficientformer_l1", "efficientformerv2_s0", "efficientvim_m1", "efficientvit_b0",
    "efficientvit_m0", "ese_vovnet19b_slim_dw", "eva02_tiny_patch14_224", "fasternet_t0",
    "fastvit_t8", "focalnet_tiny_srf", "gcresnext26ts", "gcvit_xxtiny", "ghostnet_050",
    "ghostnetv3_050", "gmlp_ti16_224", "halonet26t", "hardcorenas_a", "hgnetv2_b0",
    "hiera_tiny_224", "hrnet_w18_small", "iformer_t", "inception_next_atto", "inception_v3",
    "lambda_resnet26t", "lcnet_035", "lcnetv2_small", "legacy_seresnet18", "legacy_xception",
    "levit_128s", "levit_conv_128s", "lowformer_b0", "mambaout_femto", "maxvit_rmlp_pico_rw_256",
    "mixer_s32_224", "mixnet_s", "mobilevit_xxs", "mobilevitv2_050", "mvitv2_tiny", "nest_tiny",
    "nextvit_small", "nf_regnet_b0", "pit_ti_224", "poolformer_s12", "pvt_v2_b0", "rdnet_tiny",
    "regnetx_002", "regnety_002", "repghostnet_050", "repvit_m0_9", "res2net50_14w_8s",
    "resmlp_12_224", "resnest14d", "resnet10t", "resnetv2_18", "resnetv2_50x1_bit", "resnext26ts",
    "rexnetr_100", "sam2_hiera_tiny", "selecsls42", "sequencer2d_s", "shvit_s1", "skresnet18",
    "starnet_s050", "swiftformer_xs", "swin_tiny_patch4_window7_224", "swinv2_cr_tiny_224",
    "swinv2_tiny_window8_256", "tf_mobilenetv3_small_minimal_100", "tiny_vit_5m_224", "tinynet_e",
    "tnt_s_patch16_224", "tresnet_m", "twins_svt_small", "vgg11", "visformer_tiny",
    "vit_relpos_small_patch16_224", "vit_tiny_patch16_224", "vit_tiny_patch16_dinov3_qkvb",
    "vit_tiny_r_s16_p8_224", "vitamin_small_224", "volo_d1_224", "xception41",
    "xcit_nano_12_p16_224", "inception_resnet_v2", "inception_v4", "nasnetalarge", "pnasnet5large",
    "naflexvit_base_patch16_gap", "qwen3_vit_88m", "beit_base_patch16_224",
)
# fmt: on


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """A network by name."""

    source: str  # torchvision | timm
    name: str

    @property
    def factory(self) -> str:
        """Return model.factory."""
        own = f"torchvision.models:{self.name}"
        return own if self.source == "torchvision" else "timm:create_model"

    @property
    def args(self) -> dict[str, Any]:
        """Return model.args for the network's usual images."""
        return {} if self.source == "torchvision" else {"model_name": self.name}


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """A network as it is run."""

    parameters: int
    buffers: int  # their numbers
    side: int  # of the square images
    args: dict[str, Any]  # model.args


def networks() -> list[Network]:
    """Return torchvision's classifiers, and the chosen ones of timm if it is installed."""
    names = torchvision.models.list_models(module=torchvision.models)
    found = [Network(source="torchvision", name=name) for name in names]
    if version_of("timm") is not None:
        found += [Network(source="timm", name=name) for name in TIMM]
    return sorted(found, key=lambda network: network.name in LAST)


def version_of(source: str) -> str | None:
    """Return the version of a package; None: it is not installed."""
    try:
        return version(source)
    except PackageNotFoundError:
        return None


def fit(network: Network) -> Fit:
    """Find the smallest images that a network takes, by a forward of nothing but shapes.

    Raises:
        RuntimeError: it takes none of SIDES.
    """
    told = ""
    for side, args in _sizes(network):
        try:
            module = build(network, args)
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            told = _first_line(error)
            continue
        try:
            _forward(module, side)
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            told = _first_line(error)
            continue
        return Fit(
            parameters=sum(p.numel() for p in module.parameters()),
            buffers=sum(b.numel() for b in module.buffers()),
            side=side,
            args=args,
        )
    raise RuntimeError(f"takes images of none of {SIDES}: {told}")


def build(network: Network, args: dict[str, Any]) -> nn.Module:
    """Make the network without memory for its weights; with it, if its factory computes some."""
    factory = import_callable(network.factory, "model.factory")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with torch.device("meta"):
                return factory(num_classes=NUM_CLASSES, **args)
        except (NotImplementedError, RuntimeError):  # a value is needed: tolist, item
            return factory(num_classes=NUM_CLASSES, **args)


def size_gib(parameters: int, buffers: int) -> float:
    """Return what a rank needs beside activations: weights, gradients, momentum, a save's copy."""
    return 4 * (3 * parameters + 2 * parameters + 2 * buffers) / 2**30


def _sizes(network: Network) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (side, model.args): what may fit, the smallest first, the network's own last."""
    usual, fixed = _usual_side(network)
    for side in SIDES:
        if side >= usual:
            break
        if not fixed:
            yield side, network.args
        elif network.name.startswith("maxvit"):
            continue  # its windows fit its own images
        else:
            name = "image_size" if network.source == "torchvision" else "img_size"
            yield side, network.args | {name: side}
    yield usual, network.args


def _usual_side(network: Network) -> tuple[int, bool]:
    """Return the side of the images that a network is made for, and whether it takes only those."""
    if network.source == "torchvision":
        fixed = network.name.startswith(("vit_", "maxvit"))
        return (299 if network.name == "inception_v3" else 224), fixed
    config = import_module("timm").get_pretrained_cfg(network.name)
    if config is None:
        return 224, False
    return int(config.input_size[1]), bool(config.fixed_input_size)


@torch.no_grad()
def _forward(module: nn.Module, side: int) -> None:
    device = next(module.parameters()).device
    module.train()(torch.zeros(2, 3, side, side, device=device))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
