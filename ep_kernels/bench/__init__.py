"""Timings of dispatch and combine against baselines that do the same work, in one run.

    python -m ep_kernels.bench --ranks 2
    python -m ep_kernels.bench --ranks 2 --low-latency

What is timed, on every rank, in this order again and again:

    ep_kernels   Buffer.dispatch and Buffer.combine
    gloo, mpi    permute, all-to-all and unpermute of the same tokens: torch.distributed with gloo,
                 MPI's Alltoallv through mpi4py
    memcpy       every rank copies private memory at the same time: the machine's limit

With --low-latency it is Buffer.low_latency_dispatch and _combine against all-to-alls that move the
same rows between buffers made before: no permute, no exchange of counts, no sums.

An operation's time is that of its slowest rank. Its floor is the bytes of rows that it must read
and write, over the memcpy rate. The ranks are started by this program, with mpirun if the MPI
baseline runs.

Modules: workload (sizes, inputs, bytes) - contenders, baseline, low_latency, transports (what is
timed) - timing - worker (one rank) - launcher (all ranks) - report (table, JSON lines) - cli.
"""
