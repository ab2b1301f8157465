"""A CUDA device with real values on a machine that has only processors.

    from tests.support.emulated_accelerator import install
    device = install()                      # torch.device("cuda", 0); this process takes its code paths for GPUs now
    with device: model = Net()

Shows that a program's tensors are where CUDA needs them. Every operation of torch (ATen) that takes a tensor of this
device, or makes one, goes through `operations.run`, which raises what CUDA would raise, does the operation on the
processor, and returns a tensor of the device. Values are real, so routing, `tolist`, checkpoints, digests and losses
are those of a run on processors, bit for bit if that takes plain attention (`enable_flash_sdp(False)`).

Method: `Tensor` is a subclass whose memory is the storage of an ordinary CPU tensor, under another dispatch key
(`_make_subclass(device_for_backend_keys=...)`, as FakeTensor does). So views, `param.data = ...`, in-place operations
and autograd's graph are torch's own, and no dispatch mode has to be entered in each thread: factories arrive by a
fallback for the device's key. Autograd runs backward passes, hooks included, in a thread of the device, as on a GPU.
Torch's C++ takes the device for an XLA device, which unlike PrivateUse1 is no accelerator to it: those need stream
guards, and one in Python ends the process if an operation raises in a backward pass. Python code sees `cuda:0` and a
`torch.cuda` that answers. DeepSpeed uses its CUDA accelerator, unchanged.

Refused with `DeviceError`, a RuntimeError, unless another type is named:
- tensors on two devices in one operation; but a 0-dim CPU tensor may be an operand of pointwise ones, and CPU tensors
  may index, as on CUDA
- `numpy()` (TypeError), a CPU generator for device tensors, pinned memory that isn't the host's, a second GPU
- under `torch.use_deterministic_algorithms`: operations without a deterministic form on CUDA, and products without
  CUBLAS_WORKSPACE_CONFIG
- in a group of backend nccl, which gloo plays: CPU tensors, and number formats that nccl lacks; in a group without a
  backend for the device, all of its tensors; device tensors passed to a gloo group directly
A copy to pinned memory with `non_blocking=True` holds garbage until the host waits for the device.

`with survey() as findings:` counts refusals instead of raising them, so that one run lists all (a backward pass through
two devices ends it nevertheless). `with host_syncs() as places:` counts the places where the host waits for the
device: `item`, `tolist`, `nonzero`, `cpu`, ... `with launches() as begun:` records collectives in the order in which
they are begun.

Limits. Nothing else is asynchronous: races between streams, results of collectives that are read too early, and memory
that is reused while another stream reads it stay hidden, and times mean nothing. Memory isn't counted: `torch.cuda`'s
statistics are zeros, but for the free memory, which EMULATED_GPU_FREE_BYTES names. nccl's own ways to fail, hang and
abort aren't those of gloo. Kernels are the CPU's: other roundings, none of CUDA's limits of shape, number format and
alignment; attention is always the plain one; C++ or Triton kernels of others see host memory. `module.to` from the CPU
makes new parameters, where CUDA keeps the objects; autocast does nothing; lazy modules and torch.compile don't work.
One device per process, until it ends, and none where there is a real one. An operation costs 20 to 40 us more. Ranks
that are threads of one process share the device's one thread for backward passes, as on a GPU, so one that waits for a
peer there waits for ever.

Written with torch 2.13. It uses private parts of torch, marked P, and one C++ symbol by its name on Linux.
"""

from tests.support.emulated_accelerator.collectives import launches
from tests.support.emulated_accelerator.installation import install
from tests.support.emulated_accelerator.refusals import DeviceError, Finding, host_syncs, survey

__all__ = ["DeviceError", "Finding", "host_syncs", "install", "launches", "survey"]
