"""On sys.path only after ep_kernels.deep_ep.install(): what spawned processes find as deep_ep.

It replaces itself by ep_kernels.deep_ep while it is imported.
"""

from ep_kernels.deep_ep import install

install()
