import pytest
import torch

from orchestrator.comm.tokens.activation_codec import Wire, decode, encode
from tests.support import devices

pytestmark = pytest.mark.usefixtures("device")


@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize("wire", ["bf16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("whole", [0, 1, 3])
def test_rows_of_any_number_are_decoded(rows: int, wire: Wire, dtype: torch.dtype, whole: int) -> None:
    x_ND = torch.linspace(-1.0, 1.0, rows * 70).view(rows, 70).to(devices.device(), dtype)
    found_ND = decode(encode(x_ND, wire, whole), wire, dtype, whole)
    assert found_ND.dtype is dtype
    torch.testing.assert_close(found_ND, x_ND, atol=0.02, rtol=0.02)
    assert torch.equal(found_ND[:, 70 - whole :], x_ND[:, 70 - whole :])
