"""Bucket lists and placement against values computed by hand from sd-scripts' rules."""

from __future__ import annotations

import pytest

from library.buckets import BucketRule, Placement, bucket_sizes, check_rule, cover, nearest_by_ratio
from library.errors import UserError


def rule(**changes: object) -> BucketRule:
    settings = {"resolution": (512, 512), "enabled": True, "minimum": 256, "maximum": 1024, "step": 64, "no_upscale": False}
    return BucketRule(**{**settings, **changes})  # type: ignore[arg-type]


def test_the_512_bucket_list_is_the_one_computed_by_hand() -> None:
    # the tallest multiple of 64 within 262144 // width: 256 -> 1024, 320 -> 768, 384 -> 640, 448 -> 576, 512 -> 512
    expected = {(256, 1024), (320, 768), (384, 640), (448, 576), (512, 512), (576, 448), (640, 384), (768, 320), (1024, 256)}
    # wider ones: 576 -> 448, 640 -> 384, 704 -> 320 (372 // 64 = 5), 768 -> 320, 832 to 1024 -> 256 (315 // 64 = 4)
    expected |= {(704, 320), (320, 704), (832, 256), (256, 832), (896, 256), (256, 896), (960, 256), (256, 960)}
    assert set(bucket_sizes((512, 512), 256, 1024, 64)) == expected


def test_no_bucket_is_larger_than_the_resolution_and_every_side_is_a_multiple_of_the_step() -> None:
    for step in (8, 16, 32, 64):
        sizes = bucket_sizes((768, 512), 256, 1024, step)
        assert sizes == tuple(sorted(sizes))
        assert all(width % step == 0 and height % step == 0 for width, height in sizes)
        assert all(width * height <= 768 * 512 and min(width, height) >= 256 for width, height in sizes)
        assert {(height, width) for width, height in sizes} == set(sizes)


def test_the_largest_square_is_there_even_below_the_minimum_side() -> None:
    assert (192, 192) in bucket_sizes((200, 200), 256, 512, 64)


def test_a_picture_goes_to_the_bucket_of_the_nearest_aspect_ratio() -> None:
    sizes = rule().sizes
    assert nearest_by_ratio((1000, 1000), sizes) == (512, 512)
    assert nearest_by_ratio((1920, 1080), sizes) == (640, 384)  # 1.778: 640/384 = 1.667, 704/320 = 2.2
    assert nearest_by_ratio((704, 320), sizes) == (704, 320)  # an exact bucket is used as it is


def test_the_resized_picture_covers_its_bucket_on_both_sides() -> None:
    assert cover((1920, 1080), (640, 384)) == (683, 384)
    assert cover((1080, 1920), (384, 640)) == (384, 683)
    assert rule().place((1920, 1080)) == Placement((640, 384), (683, 384))
    for size in [(1, 1), (37, 911), (4000, 3), (513, 511)]:
        placement = rule().place(size)
        assert all(full >= side for full, side in zip(placement.resized, placement.bucket, strict=True))


def test_without_buckets_there_is_one_size() -> None:
    fixed = rule(enabled=False, step=8)
    assert fixed.sizes == ((512, 512),)
    assert fixed.place((300, 210)) == Placement((512, 512), (731, 512))


def test_random_crops_without_buckets_are_cut_at_native_size_where_the_picture_is_large_enough() -> None:
    fixed = rule(enabled=False, step=8)
    assert fixed.place((2000, 600), native_crop=True) == Placement((512, 512), (2000, 600))
    assert fixed.place((2000, 400), native_crop=True).resized == (2560, 512)


def test_bucket_no_upscale_keeps_small_pictures_and_shrinks_large_ones_to_the_area() -> None:
    small = rule(no_upscale=True)
    assert small.place((300, 210)) == Placement((256, 192), (300, 210))
    # sqrt(262144 * 2) = 724 wide, 362 high. By width: 704 x 320, ratio 2.2; by height: 640 x 320, ratio 2.0, which is exact
    assert small.place((1000, 500)) == Placement((640, 320), (640, 320))


def test_bucket_no_upscale_names_a_picture_that_fits_no_step() -> None:
    with pytest.raises(UserError, match="40x500 is smaller than one bucket step"):
        rule(no_upscale=True).place((40, 500))


def test_a_preferred_bucket_is_used_only_if_it_is_one_of_the_list() -> None:
    assert rule().place((500, 500), preferred=(640, 384)).bucket == (640, 384)
    assert rule().place((500, 500), preferred=(648, 384)).bucket == (512, 512)


def test_minimum_rounds_down_and_maximum_up_to_the_step() -> None:
    sizes = rule(minimum=300, maximum=700).sizes
    assert min(side for size in sizes for side in size) == 256
    assert max(side for size in sizes for side in size) == 704


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"step": 12}, "bucket_reso_steps is 12, but this model needs a multiple of 8"),
        ({"minimum": 600}, "min_bucket_reso 600 is larger than the resolution 512x512"),
        ({"maximum": 400}, "max_bucket_reso 400 is smaller than the resolution 512x512"),
        ({"enabled": False, "resolution": (500, 512)}, "500x512 is not a multiple of 8, which this model needs. Use 496x512"),
    ],
)
def test_settings_the_model_cannot_have_are_named(changes: dict[str, object], says: str) -> None:
    (message,) = check_rule(rule(**changes), 8, "[[datasets]] 1")
    assert says in message


def test_settings_the_model_can_have_are_accepted() -> None:
    assert check_rule(rule(), 64, "x") == []
    assert check_rule(rule(resolution=(500, 500)), 8, "x") == []  # buckets make multiples of any resolution
    assert check_rule(rule(minimum=520, maximum=500), 8, "x") == []  # the sides in whole steps count: 512 and 512
