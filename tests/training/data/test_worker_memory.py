"""Memory that workers of a DataLoader need for the bank and the collator."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from banks import config_of, small_value_encoder
from torch.utils.data import DataLoader, Dataset

from tinyalign_vlm.modeling_tinyalign.bank_rows import BankRows
from tinyalign_vlm.training.data.collator import TrainingCollator
from tinyalign_vlm.training.data.memory_dropout import MemoryDropout


@pytest.fixture(scope="module")
def large_bank() -> BankRows:
    """200 MB of values."""
    rows, shape = 20_000, (50, 100)
    encoder = small_value_encoder(num_latents=shape[0], latent_dim=shape[1])
    bank = BankRows(replace(config_of(4, encoder, quantized=False), num_rows=rows))
    bank.folder.mkdir(parents=True)
    values = np.memmap(bank.folder / "values.bin", np.float16, "w+", shape=(rows, *shape))
    values[:] = 1
    values.flush()
    return bank


def own_megabytes() -> float:
    """Memory of this process that no file backs: what it would not share with others."""
    with open("/proc/self/smaps_rollup") as file:
        (line,) = [line for line in file if line.startswith("Anonymous:")]
    return int(line.split()[1]) / 1024


class Reads(Dataset):
    """Item i reads a tenth of the bank and says how much memory of its own the worker has."""

    def __init__(self, bank: BankRows):
        self.bank = bank

    def __len__(self) -> int:
        return 10

    def __getitem__(self, part: int) -> tuple[float, float, int]:
        before = own_megabytes()
        for start in range(part * 2000, (part + 1) * 2000, 50):
            assert self.bank.gather(np.arange(start, start + 50), torch.float16).min() == 1
        return before, own_megabytes(), torch.utils.data.get_worker_info().id


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_share_the_bank(start, large_bank):
    loader = DataLoader(Reads(large_bank), batch_size=None, num_workers=2, multiprocessing_context=start)
    read = list(loader)
    assert {worker for _, _, worker in read} == {0, 1}
    for worker in (0, 1):
        before, after = read[worker][0], read[8 + worker][1]
        assert after - before < 20  # of the 100 MB that it read


def test_a_collator_is_small_to_send(processor, bank, features, tmp_path):
    np.save(tmp_path / "features.npy", np.zeros((1000, 16, 16), np.float16))
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
    size = len(pickle.dumps(TrainingCollator(processor, mapped, bank, dropout=MemoryDropout(0.5, 2))))
    bare = len(pickle.dumps(processor))
    assert size - bare < 20_000
    assert len(pickle.dumps(bank)) > 20_000  # its encoders
