"""DeepEP's tuning parameters."""

from __future__ import annotations

from ep_kernels.errors import EPConfigError

_CHUNK_NAMES = {
    "nvl_send": "num_max_nvl_chunked_send_tokens",
    "nvl_recv": "num_max_nvl_chunked_recv_tokens",
    "rdma_send": "num_max_rdma_chunked_send_tokens",
    "rdma_recv": "num_max_rdma_chunked_recv_tokens",
}


class Config:
    """SMs of a transfer, and chunk sizes of rings that ep_kernels does not have.

    Args:
        num_sms: SMs on a GPU. The CPU backend uses its own number of threads.
        *chunk_tokens: nvl_send=6, nvl_recv=256, rdma_send=6, rdma_recv=256: kept, without effect.
        **named_chunk_tokens: the same by these names or by DeepEP's long ones, such as
            num_max_nvl_chunked_send_tokens.

    Raises:
        EPConfigError: an unknown name, a name given twice, or a number that is not positive.
    """

    def __init__(self, num_sms: int = 20, *chunk_tokens: int, **named_chunk_tokens: int) -> None:
        names = dict(zip(_CHUNK_NAMES, chunk_tokens))
        if len(chunk_tokens) > len(_CHUNK_NAMES):
            raise EPConfigError(f"Config got {len(chunk_tokens)} chunk sizes, expected at most 4")
        short_names = {long: short for short, long in _CHUNK_NAMES.items()}
        for name, value in named_chunk_tokens.items():
            short = short_names.get(name, name)
            if short not in _CHUNK_NAMES or short in names:
                raise EPConfigError(f"Config: {name}={value} is unknown or given twice")
            names[short] = value
        for name, value in {"num_sms": num_sms, **names}.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise EPConfigError(f"Config: {name}={value!r} is not a positive int")
        self.num_sms = num_sms
        self.nvl_send = names.get("nvl_send", 6)
        self.nvl_recv = names.get("nvl_recv", 256)
        self.rdma_send = names.get("rdma_send", 6)
        self.rdma_recv = names.get("rdma_recv", 256)

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes that Buffer(num_nvl_bytes=) should have: none, results take pool memory."""
        del hidden_bytes, num_ranks
        return 0

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes that Buffer(num_rdma_bytes=) should have: none, results take pool memory."""
        del hidden_bytes, num_ranks
        return 0
