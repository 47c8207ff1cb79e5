"""An autoencoder that starts as area averages and their bilinear inverse, and learns the rest.

A random AutoencoderKL spends its first thousands of steps on reproducing mean colours. This one is
built to do so before any training: three latent channels are the mean red, green and blue of 4 x 4
pixels, every residual branch starts at zero, and what stands in the way, the normalisation and
activation before either last convolution, is made to pass a value s as it is:

- s is carried as the pair s and -s, because silu(x) - silu(-x) = x;
- the same group holds a pair of constants far larger than s, which fix what it is divided by.

All other weights start at random, as usual.
"""

import math

import torch
from diffusers import AutoencoderKL
from torch import nn

LATENT_CHANNELS, COLOURS, NUM_GROUPS = 4, 3, 4
CONSTANT = 4.0
START_LOG_VARIANCE = -6.0


def build_vae(image_size: int) -> AutoencoderKL:
    """The autoencoder, of factor 4: few channels where there are many pixels."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 24, 32),
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=NUM_GROUPS,
        sample_size=image_size,
        mid_block_add_attention=False,
    )
    with torch.no_grad():
        _start_as_averages(vae)
    return vae


def _start_as_averages(vae: AutoencoderKL) -> None:
    for name, module in vae.named_modules():
        if name.endswith(".conv2"):
            module.weight.zero_()
            module.bias.zero_()
    encoder, decoder = vae.encoder, vae.decoder
    point = torch.ones(1, 1)
    average = torch.full((2, 2), 0.25)
    binomial = torch.tensor([1.0, 2.0, 1.0]) / 4
    smooth = torch.outer(binomial, binomial)  # after doubling by repetition: bilinear
    for convolution in (encoder.conv_in, decoder.conv_in):
        _carry(convolution, point)
    for block in encoder.down_blocks[:-1]:
        _carry(block.downsamplers[0].conv, average)
    for block in decoder.up_blocks[:-1]:
        _carry(block.upsamplers[0].conv, smooth)
    _carry(encoder.down_blocks[1].resnets[0].conv_shortcut, point)
    _carry(decoder.up_blocks[1].resnets[0].conv_shortcut, point)
    _pair(encoder.down_blocks[2].resnets[0].conv_shortcut, encoder.conv_norm_out)
    _pair(decoder.up_blocks[2].resnets[0].conv_shortcut, decoder.conv_norm_out)
    _unpair(encoder.conv_out)
    _unpair(decoder.conv_out)
    encoder.conv_out.weight[LATENT_CHANNELS:].zero_()
    encoder.conv_out.bias[LATENT_CHANNELS:] = START_LOG_VARIANCE
    for convolution in (vae.quant_conv, vae.post_quant_conv):
        nn.init.dirac_(convolution.weight)
        convolution.bias.zero_()


def _bias(convolution: nn.Conv2d) -> torch.Tensor:
    assert convolution.bias is not None
    return convolution.bias


def _carry(convolution: nn.Conv2d, kernel: torch.Tensor) -> None:
    """Make the first outputs the first inputs, filtered by `kernel`.

    A kernel of odd size stands in the middle, one of even size in the upper left, where diffusers'
    downsampling pads on the other side alone.
    """
    size = kernel.shape[0]
    at = (convolution.kernel_size[0] - size) // 2
    convolution.weight[:COLOURS].zero_()
    _bias(convolution)[:COLOURS].zero_()
    for channel in range(COLOURS):
        convolution.weight[channel, channel, at : at + size, at : at + size] = kernel


def _pair(shortcut: nn.Conv2d, normalization: nn.GroupNorm) -> None:
    """Make channels s, -s and two constants of the first inputs, each in a group of its own."""
    size = shortcut.out_channels // NUM_GROUPS
    for colour in range(COLOURS):
        first = colour * size
        shortcut.weight[first : first + 4].zero_()
        shortcut.weight[first, colour], shortcut.weight[first + 1, colour] = 1.0, -1.0
        _bias(shortcut)[first : first + 4] = torch.tensor([0.0, 0.0, CONSTANT, -CONSTANT])
    normalization.weight.fill_(CONSTANT * math.sqrt(2 / size))


def _unpair(convolution: nn.Conv2d) -> None:
    """Make the first outputs s again."""
    size = convolution.in_channels // NUM_GROUPS
    convolution.weight[:COLOURS].zero_()
    _bias(convolution)[:COLOURS].zero_()
    for colour in range(COLOURS):
        convolution.weight[colour, colour * size, 1, 1] = 1.0
        convolution.weight[colour, colour * size + 1, 1, 1] = -1.0
