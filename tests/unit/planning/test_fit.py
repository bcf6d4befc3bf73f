"""Whether a run fits, and what is changed until it does."""

from __future__ import annotations

from lit_instruct.planning.architecture import GPT3
from lit_instruct.planning.fit import device_counts, fewest_devices, fit
from lit_instruct.planning.hardware import GIB, parse_hardware
from lit_instruct.planning.memory import peak
from lit_instruct.planning.settings import Settings
from lit_instruct.planning.setup import Lengths, Text, Work


def settings(*, rows: int = 64, text: Text | None = None, size: str = "1.3b") -> Settings:
    lengths = Lengths(512.0, 512.0, 512, 512)
    work = Work(rows, rows, 32, None, 256, 1, lengths, text=text)
    return Settings("ppo", GPT3[size], GPT3[size], work, precision="bf16-mixed")


def test_what_fits_is_left_as_it_is():
    found = fit(settings(), parse_hardware("8xH200-141GB")._replace(per_node=64), "sharded")
    assert found.fits
    assert found.changes == ()
    assert found.settings == settings()


def test_changes_are_made_until_it_fits_and_no_further():
    hardware = parse_hardware("2xH100-80GB")
    found = fit(settings(), hardware, "sharded")
    assert found.fits
    assert "model.micro_batch_size 4" in found.changes
    assert found.worst.total <= hardware.usable
    assert found.worst == peak(found.settings.setup(hardware))
    larger = found.settings._replace(work=found.settings.work._replace(micro_rows=8))
    assert peak(larger.setup(hardware)).total > hardware.usable


def test_text_is_read_in_smaller_passes_where_it_is_the_most():
    mixed = settings(text=Text(8.0, 32, 2048, True))
    found = fit(mixed, parse_hardware("8xH100-80GB"), "sharded")
    assert found.fits
    assert found.settings.work.text is not None
    assert found.settings.work.text.micro_rows < 32
    assert any(change.startswith("PtxMixing.micro_batch_size") for change in found.changes)


def test_one_device_may_put_frozen_networks_aside():
    hardware = parse_hardware("H100-80GB")
    found = fit(settings(), hardware._replace(device=hardware.device._replace(memory=50 * GIB)), "sharded")
    assert found.fits
    assert "model.offload_frozen true" in found.changes


def test_what_can_never_fit_is_said_to():
    tiny = parse_hardware("H100-80GB")
    tiny = tiny._replace(device=tiny.device._replace(memory=3 * GIB))
    assert not fit(settings(), tiny, "sharded").fits
    assert fewest_devices(settings(size="175b"), tiny, "sharded") is None


def test_rows_and_chunks_must_divide_by_the_devices():
    assert list(device_counts(settings(rows=12))) == [1, 2, 3, 4, 6, 12]
    assert list(device_counts(settings(rows=12, text=Text(0.5, 1, 16, False)))) == [1, 2, 3, 6]


def test_the_fewest_devices_are_enough_and_one_less_is_not():
    there, found = fewest_devices(settings(size="6b"), parse_hardware("8xA100-80GB"), "sharded") or (None, None)
    assert there is not None
    assert found is not None
    assert found.worst.total <= there.usable
    fewer = there._replace(per_node=there.per_node // 2)
    assert not fit(settings(size="6b"), fewer, "sharded").fits
