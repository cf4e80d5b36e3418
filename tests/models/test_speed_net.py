"""The whitening layer whitens, and views of a picture are averaged as they should be."""

import torch

from dist_train.models.speed_net import speed_net
from dist_train.tasks.classification import mean_over_views


def test_whitened_patches_have_unit_variance_and_no_covariance() -> None:
    torch.manual_seed(0)
    smooth = torch.nn.functional.avg_pool2d(torch.randn(200, 3, 34, 34), 3, stride=1)
    images = 3 * smooth + torch.tensor([0.5, -0.2, 0.1]).view(1, 3, 1, 1)
    net = speed_net(10)
    net.initialise_from(images)
    with torch.no_grad():
        out = net.whiten(images).transpose(0, 1).flatten(1)
    second = out[:12] @ out[:12].T / out.shape[1]
    assert (second - torch.eye(12)).abs().max() < 0.1
    assert torch.equal(out[:12], -out[12:])
    assert not net.whiten.weight.requires_grad


def test_the_net_takes_pictures_and_gives_logits() -> None:
    assert speed_net(7, widths=(8, 16, 16))(torch.randn(2, 3, 32, 32)).shape == (2, 7)


def test_views_are_weighted_as_described() -> None:
    images = torch.arange(2 * 1 * 4 * 4, dtype=torch.float32).view(2, 1, 4, 4)
    seen = []

    def model(pictures: torch.Tensor) -> torch.Tensor:
        seen.append(pictures)
        return pictures[:, 0, 0, :2]  # the two left pixels of the first row

    found = mean_over_views(model, images, model(images), 6)
    assert len(seen) == 6
    row, moved = images[:, 0, 0], []
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1), mode="reflect")
    for shift in (0, 2):
        part = padded[:, 0, shift, shift : shift + 4]
        moved.append((part[:, :2] + part.flip(1)[:, :2]) / 2)
    expected = (row[:, :2] + row.flip(1)[:, :2]) / 4 + (moved[0] + moved[1]) / 4
    torch.testing.assert_close(found, expected)
    two = mean_over_views(model, images, model(images), 2)
    torch.testing.assert_close(two, (row[:, :2] + row.flip(1)[:, :2]) / 2)
