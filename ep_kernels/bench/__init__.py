"""Timings of dispatch and combine against baselines that do the same work, in one run.

    python -m ep_kernels.bench --ranks 2
    python -m ep_kernels.bench --ranks 2 --low-latency
    python -m ep_kernels.bench --device cuda --ranks 8 --num-sms 8 16

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

With --device cuda it is the calls on GPUs, by CUDA events and by the host's clock, with cold
caches, for each --num-sms: along the routing of a handle, and from the router's output to rows in
the order of their experts; then NCCL, where every rank has a GPU of its own. The floor is the bytes
over the rates at which all ranks copied in the same run, within and between the GPUs.

Modules: workload (sizes, inputs, bytes) - contenders, baseline, low_latency, transports (what is
timed) - timing - worker (one rank) - launcher (all ranks) - report (table, JSON lines) - cli.
On GPUs: cuda_ops, cuda_baseline (what is timed) - cuda_copies, cuda_floors (limits) - cuda_timing -
cuda_worker (one rank) - cuda_report - cuda_cli - plot.
"""
