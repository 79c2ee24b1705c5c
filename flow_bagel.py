# Copyright 2026 The BAGEL for transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Images as latents, and the flow between noise and latents: time grid, velocity, guidance, sampler; knows no tokens.

t = 1 is noise, t = 0 is the image. The velocity points from image to noise, v = dx/dt = noise - image, so a step
towards the image subtracts: x <- x - v * dt. The sampler draws with any model that has a `predict_velocity`.

Axes: (samples, latent tokens, features).
"""

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import torch
from torch import nn
from transformers.utils import logging

from .configuration_bagel import BagelConfig, BagelVAEConfig
from .layout_bagel import BoolTensor


logger = logging.get_logger(__name__)

PIXELS_PER_ENCODING = 512 * 512  # what the VAE encodes at once; a larger image goes alone
OUTPUT_TYPES = ("pil", "pt", "latent")

RenormType = Literal["global", "channel", "text_channel"]
RENORM_TYPES = ("global", "channel", "text_channel")


def shift_timesteps(t: torch.Tensor, shift: float) -> torch.Tensor:
    """Move timesteps towards noise (`shift` > 1): s * t / (1 + (s - 1) * t)."""
    return shift * t / (1 + (shift - 1) * t)


def timestep_grid(num_timesteps: int, shift: float) -> torch.Tensor:
    """
    The knots of the released sampler, (num_timesteps,) float32 from 1 down to 0.

    `num_timesteps` counts KNOTS: the network runs `num_timesteps - 1` times (49 times for the released 50).
    """
    if num_timesteps < 2:
        raise ValueError(f"num_timesteps={num_timesteps} gives no step; it counts the knots, so use at least 2.")
    return shift_timesteps(torch.linspace(1, 0, num_timesteps), shift)


def training_timesteps(packed_timesteps: torch.Tensor, shift: float) -> torch.Tensor:
    """Pre-sigmoid draws (minus infinity = clean) -> shifted timesteps in [0, 1]."""
    return shift_timesteps(torch.sigmoid(packed_timesteps), shift)


def interpolate(clean: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """x_t on the straight path from `clean` (t = 0) to `noise` (t = 1)."""
    return (1 - t) * clean + t * noise


def velocity_target(clean: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    return noise - clean


def guided_steps(t: torch.Tensor, interval: tuple[float, float]) -> list[bool]:
    """
    Which steps are guided: lo < t <= hi, compared in float32 as released (0.8 <= 0.8 holds; a knot that rounds to
    1.0000001 lies outside (0, 1]).
    """
    lo, hi = interval
    return ((t > lo) & (t <= hi)).tolist()


def guide(
    v_cond: torch.Tensor,
    v_text: torch.Tensor | None,
    v_image: torch.Tensor | None,
    text_scale: float,
    image_scale: float,
    renorm_type: RenormType = "global",
    renorm_min: float = 0.0,
    valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Classifier-free guidance over text and over images, with the released renormalisation.

    Args:
        v_cond: velocity under the whole context, (samples, tokens, features).
        v_text: velocity without the last text; `None` = no guidance at all.
        v_image: velocity without images; `None` = no image guidance.
        text_scale, image_scale (`float`): weights; 1 is neutral.
        renorm_type: the length of the guided velocity is brought back to at most that of `v_cond`:
            `"global"` over a whole sample, `"channel"` per token, `"text_channel"` per token and before image
            guidance is added (which then is not renormalised).
        renorm_min (`float`): smallest factor.
        valid: (samples, tokens) bool, `False` for padding, which has no say in a sample's norm, whatever it holds.

    Returns:
        The guided velocity. Difference to the released code: `"global"` takes its norm per sample, not over the batch.
    """
    if v_text is None:
        return v_cond
    guided = v_text + text_scale * (v_cond - v_text)
    if renorm_type == "text_channel":
        guided = _renorm(guided, v_cond, (-1,), renorm_min)
    if v_image is not None:
        guided = v_image + image_scale * (guided - v_image)
    if renorm_type == "channel":
        guided = _renorm(guided, v_cond, (-1,), renorm_min)
    elif renorm_type == "global":
        guided = _renorm(guided, v_cond, (-2, -1), renorm_min, valid)
    return guided


def _renorm(
    v: torch.Tensor, reference: torch.Tensor, dims: tuple[int, ...], minimum: float, valid: torch.Tensor | None = None
) -> torch.Tensor:
    counted = [x if valid is None else x * valid[..., None] for x in (reference, v)]
    norm_reference, norm_v = (torch.linalg.vector_norm(x, dim=dims, keepdim=True) for x in counted)
    return v * (norm_reference / (norm_v + 1e-8)).clamp(min=minimum, max=1.0)


def patchify_latents(latents: torch.Tensor, patch_size: int) -> torch.Tensor:
    """(channels, h * p, w * p) -> (h * w, p * p * channels): tokens row by row, features (row, column, channel)."""
    grid = latents.unflatten(2, (-1, patch_size)).unflatten(1, (-1, patch_size))  # (c, h, p, w, q)
    return grid.permute(1, 3, 2, 4, 0).flatten(2).flatten(0, 1)


def unpatchify_latents(tokens: torch.Tensor, grid: tuple[int, int], patch_size: int) -> torch.Tensor:
    """The inverse of [`patchify_latents`]; `grid` is (h, w) in tokens."""
    h, w = grid
    cells = tokens.unflatten(1, (patch_size, patch_size, -1)).unflatten(0, (h, w))  # (h, w, p, q, c)
    return cells.permute(4, 0, 2, 1, 3).flatten(3).flatten(1, 2)


# --------------------------------------------------------------------------------------------------------------------
# Drawing


@dataclass(frozen=True)
class DrawingOptions:
    """
    How an image is drawn; names and defaults of the released sampler.

    A model brings other defaults of `num_timesteps`, `timestep_shift`, `cfg_*` and `sample_posterior` along in its
    `generation_config.json`, as it does for writing; arguments of `generate` come before those.

    Args:
        num_timesteps (`int`): knots of the time grid; the network runs `num_timesteps - 1` steps.
        timestep_shift (`float`): moves the knots towards noise.
        cfg_text_scale, cfg_img_scale (`float`): guidance weights; text guidance of at most 1 switches both off.
        cfg_interval: guidance acts where `lo < t <= hi` (t = 1 is noise).
        cfg_renorm_min (`float`), cfg_renorm_type: see [`flow_bagel.guide`].
        height, width (`int`, or one per sample): pixels; by default those of the last edited image, else 1024 (or
            the largest the latent table allows).
        latents: initial noise, per sample (latent tokens, patch_latent_dim).
        generator: a `torch.Generator` or one per sample; noise is drawn on the CPU.
        sample_posterior (`bool`): sample the VAE posterior of edited images (released) or take its mode.
        scheduler: any diffusers flow-match scheduler; Euler by default. One that accepts `sigmas` is given the
            released grid (its own shift, if it has one, comes on top).
        callback_on_step_end: `f(model, step, t, {"latents", "velocity"})`; may return a dict with new `latents`.
        output_type: `"pil"`, `"pt"` (3, height, width) in [0, 1], or `"latent"` (latent tokens, patch_latent_dim).
        progress_bar (`bool`): show the steps.
    """

    num_timesteps: int = 50
    timestep_shift: float = 3.0
    cfg_text_scale: float = 4.0
    cfg_img_scale: float = 1.5
    cfg_interval: tuple[float, float] = (0.4, 1.0)
    cfg_renorm_min: float = 0.0
    cfg_renorm_type: RenormType = "global"
    height: int | Sequence[int] | None = None
    width: int | Sequence[int] | None = None
    latents: torch.Tensor | Sequence[torch.Tensor] | None = None
    generator: torch.Generator | list[torch.Generator] | None = None
    sample_posterior: bool = True
    scheduler: Any = None
    callback_on_step_end: Callable | None = None
    output_type: str = "pil"
    progress_bar: bool = True

    def __post_init__(self):
        lo, hi = self.cfg_interval
        if not lo <= hi:
            raise ValueError(f"cfg_interval=({lo}, {hi}) is reversed; guidance acts where lo < t <= hi.")
        if self.num_timesteps < 2:
            raise ValueError(
                f"num_timesteps={self.num_timesteps} gives no step; it counts the knots, so use at least 2."
            )
        if self.timestep_shift <= 0:
            raise ValueError(f"timestep_shift={self.timestep_shift} must be positive; 1 leaves the grid even.")
        if self.cfg_renorm_type not in RENORM_TYPES:
            raise ValueError(f"cfg_renorm_type={self.cfg_renorm_type!r} is unknown; choose one of {RENORM_TYPES}.")
        if not 0 <= self.cfg_renorm_min <= 1:
            raise ValueError(f"cfg_renorm_min={self.cfg_renorm_min} must lie in [0, 1].")
        if self.output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type={self.output_type!r} is unknown; choose one of {OUTPUT_TYPES}.")
        if self.cfg_img_scale > 1 >= self.cfg_text_scale:
            logger.warning_once(
                f"cfg_img_scale={self.cfg_img_scale} has no effect without cfg_text_scale > 1 (it is "
                f"{self.cfg_text_scale}), as in the released sampler."
            )

    def of_row(self, row: int) -> "DrawingOptions":
        """The options of one sample of a batch."""
        if self.latents is not None:
            raise ValueError(
                "latents cannot be given for interleaved generation; use generator for reproducible images."
            )
        values = {name: getattr(self, name) for name in ("height", "width", "generator")}
        own = {name: value[row] for name, value in values.items() if isinstance(value, list | tuple)}
        return replace(self, **own)


DRAWING_ARGUMENTS = tuple(field.name for field in fields(DrawingOptions))
STORED_ARGUMENTS = tuple(  # those that a generation config may hold
    name
    for name in DRAWING_ARGUMENTS
    if name.startswith("cfg_") or name in ("num_timesteps", "timestep_shift", "sample_posterior")
)


class VelocityModel(Protocol):
    """What the sampler calls on a model."""

    def predict_velocity(self, x_t: torch.Tensor, t: torch.Tensor, context: Any) -> torch.Tensor:
        """
        Args:
            x_t: (samples, latent tokens, features) at time t. t: scalar. context: one of [`Branches`].

        Returns:
            The velocity, like `x_t`.
        """
        ...


class Branches(NamedTuple):
    """
    The contexts of guidance, in whatever form the model wants them. Equal contexts are one object: its velocity is
    computed once.

    Attributes:
        full: everything. without_text: without the last text. without_images: without images.
    """

    full: Any
    without_text: Any
    without_images: Any


def integrate(
    model: VelocityModel,
    branches: Branches,
    x: torch.Tensor,
    options: "DrawingOptions",
    valid: BoolTensor | None = None,
) -> torch.Tensor:
    """
    From noise (t = 1) to images (t = 0).

    Args:
        x: (samples, latent tokens, features) float32 noise, padded to the largest sample.
        valid: (samples, latent tokens), `False` for padding.

    Returns:
        The final latents, like `x`.
    """
    scheduler, times = prepare_scheduler(options, x.device)
    guided = guided_steps(times, options.cfg_interval)
    steps = logging.tqdm(
        enumerate(scheduler.timesteps),
        total=len(scheduler.timesteps),
        desc="Drawing",
        unit="step",
        disable=not options.progress_bar,
    )
    for step, timestep in steps:
        t = times[step]
        v = guided_velocity(model, branches, x, t, options, guided[step], valid)
        x = scheduler.step(v, timestep, x, return_dict=False)[0]
        if options.callback_on_step_end is not None:
            changed = options.callback_on_step_end(model, step, t, {"latents": x, "velocity": v}) or {}
            x = changed.get("latents", x)
    return x


def guided_velocity(
    model: VelocityModel,
    branches: Branches,
    x: torch.Tensor,
    t: torch.Tensor,
    options: "DrawingOptions",
    is_guided: bool,
    valid: BoolTensor | None = None,
) -> torch.Tensor:
    """The velocity of one step; a branch is evaluated only if its weight is not neutral."""
    v_cond, v_text, v_image = model.predict_velocity(x, t, branches.full), None, None

    def evaluate(context: Any) -> torch.Tensor:
        return v_cond if context is branches.full else model.predict_velocity(x, t, context)

    if is_guided and options.cfg_text_scale > 1:
        v_text = evaluate(branches.without_text)
        if options.cfg_img_scale > 1:
            v_image = evaluate(branches.without_images)
    scales = (options.cfg_text_scale, options.cfg_img_scale)
    return guide(v_cond, v_text, v_image, *scales, options.cfg_renorm_type, options.cfg_renorm_min, valid)


def initial_noise(shapes: Sequence[tuple[int, int]], options: "DrawingOptions") -> torch.Tensor:
    """
    The caller's latents, or noise from the caller's generators, made on the CPU.

    Args:
        shapes: (latent tokens, features) of each sample.

    Returns:
        (samples, most latent tokens, features) float32, zero-padded.

    Raises:
        ValueError: latents of other shapes, another number of generators than samples.
    """
    if options.latents is not None:
        latents = options.latents
        noise = [latents] if isinstance(latents, torch.Tensor) and latents.ndim == 2 else list(latents)
        found = [tuple(sample.shape) for sample in noise]
        if found != list(shapes):
            raise ValueError(
                f"latents have shapes {found}, expected {list(shapes)}: (latent tokens, patch_latent_dim) per sample."
            )
    else:
        generators = options.generator
        if not isinstance(generators, list | tuple):
            generators = [generators] * len(shapes)
        if len(generators) != len(shapes):
            raise ValueError(f"{len(generators)} generators for {len(shapes)} samples; pass one, or one per sample.")
        noise = [torch.randn(shape, generator=generator) for shape, generator in zip(shapes, generators)]
    return nn.utils.rnn.pad_sequence([sample.float() for sample in noise], batch_first=True)


def prepare_scheduler(options: DrawingOptions, device: torch.device) -> tuple[Any, torch.Tensor]:
    """-> scheduler with its time steps set, and the network's t for each of them (float32, 1 = noise)."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    knots = timestep_grid(options.num_timesteps, options.timestep_shift)
    if options.scheduler is None:
        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(sigmas=knots[:-1].tolist(), device=device)
        return scheduler, knots[:-1].to(device)
    scheduler = copy.deepcopy(options.scheduler)  # a run leaves no state in the caller's object
    if "sigmas" in inspect.signature(scheduler.set_timesteps).parameters:
        scheduler.set_timesteps(sigmas=knots[:-1].tolist(), device=device)
    else:
        scheduler.set_timesteps(len(knots) - 1, device=device)
    return scheduler, scheduler.timesteps.float() / scheduler.config.num_train_timesteps


# --------------------------------------------------------------------------------------------------------------------
# Images and latents


def build_vae(config: BagelVAEConfig) -> nn.Module:
    """`diffusers.AutoencoderKL` with the architecture of the released autoencoder."""
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise ImportError(
            "Drawing pictures needs diffusers (`pip install diffusers`). Without it, load with stage=1 to read only."
        ) from error
    levels = len(config.ch_mult)
    settings: dict[str, Any] = {  # diffusers types its tuples as if they had one member
        "in_channels": config.in_channels,
        "out_channels": config.out_ch,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": tuple(config.ch * multiplier for multiplier in config.ch_mult),
        "layers_per_block": config.num_res_blocks,
        "latent_channels": config.z_channels,
        "norm_num_groups": config.norm_num_groups,
        "sample_size": config.resolution,
        "scaling_factor": config.scale_factor,
        "shift_factor": config.shift_factor,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    return AutoencoderKL(**settings)


class BagelLatentMixin:
    """Images to latent tokens and back, by the model's own `vae`."""

    if TYPE_CHECKING:
        config: BagelConfig
        vae: Any
    latent_cache: Any = None  # a trainer may put a `LatentCache` here

    def freeze_vae(self) -> None:
        """The VAE is never trained; loading turns `requires_grad` back on, so this is called after it."""
        if self.config.visual_gen:
            self.vae.requires_grad_(False)

    @torch.no_grad()
    def encode_images(
        self,
        images: Sequence[torch.Tensor],
        sample_posterior: bool = True,
        generators: Sequence[torch.Generator | None] | None = None,
    ) -> list[torch.Tensor]:
        """
        Pictures through the VAE, each at its own size.

        Args:
            images: (3, height, width) in [-1, 1], sides multiples of `latent_downsample`.
            sample_posterior: sample (released) or take the mode.
            generators: one per image; noise is drawn on the CPU.

        Returns:
            Per image (height / 16 * width / 16, patch_latent_dim) for the released model, scaled and shifted.
        """
        vae_config, tokens = self.config.vae_config, []
        cache = self.latent_cache
        posteriors = self._posteriors(images) if cache is None else cache.posteriors(images, self._posteriors)
        for number, (mean, std) in enumerate(posteriors):
            latents = mean
            if sample_posterior:
                generator = generators[number] if generators is not None else None
                eps = torch.randn((1, *mean.shape), generator=generator, dtype=torch.float32)[0]
                latents = mean + std * eps.to(device=mean.device, dtype=mean.dtype)
            latents = vae_config.scale_factor * (latents - vae_config.shift_factor)
            tokens.append(patchify_latents(latents, self.config.latent_patch_size))
        return tokens

    def _posteriors(self, images: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Mean and standard deviation per image, (z_channels, h, w). Small pictures of one size share a call."""
        same_size: dict[torch.Size, list[int]] = {}
        for number, image in enumerate(images):
            same_size.setdefault(image.shape, []).append(number)
        posteriors: list[tuple[torch.Tensor, torch.Tensor]] = [(images[0], images[0])] * len(images)
        for shape, numbers in same_size.items():
            together = max(1, PIXELS_PER_ENCODING // (shape[1] * shape[2]))
            for first in range(0, len(numbers), together):
                chunk = numbers[first : first + together]
                pixels = torch.stack([images[number] for number in chunk])
                pixels = pixels.to(device=self.vae.device, dtype=self.vae.dtype)
                with torch.autocast(self.vae.device.type, enabled=False):  # float32 in mixed precision too
                    seen = self.vae.encode(pixels).latent_dist
                for number, mean, std in zip(chunk, seen.mean, seen.std):
                    posteriors[number] = mean, std
        return posteriors

    @torch.no_grad()
    def decode_latents(self, latents: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """(latent tokens, patch_latent_dim) and its (rows, columns) -> (3, height, width) in about [-1, 1], float32."""
        vae_config = self.config.vae_config
        z = unpatchify_latents(latents, grid, self.config.latent_patch_size)[None]
        z = z / vae_config.scale_factor + vae_config.shift_factor
        return self.vae.decode(z.to(device=self.vae.device, dtype=self.vae.dtype)).sample[0].float()
