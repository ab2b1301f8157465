"""The one thread of a process that computes in parallel: the training thread.

libgomp gives every thread that runs a parallel region a pool of its own, and once all pools together have more threads
than there are cores, it no longer spins at barriers. Seen on two cores: a thread that had multiplied two matrices once,
and slept since then, cost the training beside it a quarter of its speed.
"""

import threading

import torch


def compute_here(num_threads: int) -> None:
    """Give the calling thread `num_threads` threads for torch's operations, and every thread that begins to compute
    later only one: those of Python, of Ray and of gloo, which copies gathered tensors.

    torch has one number for the process, which a thread takes over when it first computes or asks, and one for each
    thread. `set_num_threads` sets both, so a second thread takes the number of the process back.
    """
    torch.get_num_threads()  # else this thread would take the process's number over at its next operation
    torch.set_num_threads(num_threads)
    other = threading.Thread(target=torch.set_num_threads, args=(1,), name="serial")
    other.start()
    other.join()
