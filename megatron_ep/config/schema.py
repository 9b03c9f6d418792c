"""Every setting of a training run: the schema of a configuration file.

A file has one section for each field of `Config`, and each section holds the fields of its class.
Names are those of Megatron-Core's dataclasses or of Megatron-LM's flags. Any other field of
Megatron-Core's TransformerConfig may stand in the sections model, parallelism or moe, too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    ValidationInfo,
    field_validator,
)

LoadBalancing = Literal["aux_loss", "seq_aux_loss", "global_aux_loss", "sinkhorn", "none"]


def refuse_bool(value: Any, annotation: Any) -> None:
    """Raises ValueError for a boolean where none belongs.

    NOTE: to Python a boolean is a number, and YAML reads yes, no, on and off as booleans.
    """
    if isinstance(value, bool) and bool not in (annotation, *get_args(annotation)):
        raise ValueError(f"Input should not be a boolean, got {value}")


class Section(BaseModel):
    """A section of a configuration file; unknown keys are errors."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _check_bool(cls, value: Any, info: ValidationInfo) -> Any:
        refuse_bool(value, cls.model_fields[info.field_name or ""].annotation)
        return value


class ModelSection(Section):
    """The transformer."""

    num_layers: PositiveInt = 4
    """Number of transformer layers."""
    hidden_size: PositiveInt = 128
    """Width of the residual stream."""
    ffn_hidden_size: PositiveInt | None = None
    """Width inside the MLP of dense layers; 4 * hidden_size if not given."""
    num_attention_heads: PositiveInt = 4
    """Number of attention heads."""
    num_query_groups: PositiveInt | None = None
    """Number of key/value heads of grouped-query attention; num_attention_heads if not given."""
    kv_channels: PositiveInt | None = None
    """Size of a head; hidden_size / num_attention_heads if not given."""
    seq_length: PositiveInt = 256
    """Tokens in a training sequence."""
    max_position_embeddings: PositiveInt | None = None
    """Longest sequence the model can take; seq_length if not given."""
    position_embedding_type: Literal["learned_absolute", "rope", "none"] = "rope"
    """How positions are encoded; YaRN is the rope_type of multi_latent_attention."""
    rotary_base: PositiveInt = 10000
    """Base of the rotary embedding."""
    rotary_percent: float = Field(default=1.0, gt=0, le=1)
    """Share of each head that is rotated."""
    normalization: Literal["LayerNorm", "RMSNorm"] = "RMSNorm"
    """Kind of normalisation."""
    layernorm_epsilon: float = 1e-5
    """Added to the variance in normalisations."""
    activation: Literal["gelu", "silu", "relu", "squared_relu", "swiglu", "geglu"] = "swiglu"
    """Activation of MLPs and experts; swiglu and geglu are gated."""
    add_bias_linear: bool = False
    """Biases in linear layers."""
    hidden_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout of the outputs of attention and MLP."""
    attention_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout of attention probabilities."""
    untie_embeddings_and_output_weights: bool = False
    """Separate weights for the embedding and the output layer."""
    make_vocab_size_divisible_by: PositiveInt = 64
    """The vocabulary is padded to a multiple of this times the tensor parallel size."""
    init_method_std: float = Field(default=0.02, gt=0)
    """Standard deviation of initial weights."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type of weights and activations; the optimizer keeps fp32 copies."""
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Layers of Megatron-Core or of Transformer Engine; auto takes the latter where it works."""


class ParallelismSection(Section):
    """How the model is spread over ranks."""

    tensor_model_parallel_size: PositiveInt = 1
    """Ranks that share each layer."""
    pipeline_model_parallel_size: PositiveInt = 1
    """Stages of layers."""
    virtual_pipeline_model_parallel_size: PositiveInt | None = None
    """Chunks of layers in each stage (interleaved schedule)."""
    context_parallel_size: PositiveInt = 1
    """Ranks that share each sequence; needs Transformer Engine."""
    expert_model_parallel_size: PositiveInt = 1
    """Ranks over which the experts are spread."""
    expert_tensor_parallel_size: PositiveInt | None = None
    """Ranks that share each expert; tensor_model_parallel_size if not given."""
    sequence_parallel: bool | None = None
    """Split activations between the layers of tensor-parallel ranks; if not given, when TP > 1."""
    use_distributed_optimizer: bool = False
    """Spread the optimizer's state over data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass runs."""
    overlap_param_gather: bool = False
    """Gather weights of the distributed optimizer while the forward pass runs."""
    distributed_backend: Literal["auto", "gloo", "nccl"] = "auto"
    """Backend of torch.distributed; auto is nccl for GPUs that no ranks share, else gloo."""
    distributed_timeout_minutes: PositiveInt = 30
    """How long a collective of torch.distributed waits."""


class MoESection(Section):
    """The Mixture-of-Experts layers."""

    num_experts: PositiveInt | None = None
    """Number of experts of a layer; none makes a dense model."""
    moe_layer_freq: PositiveInt | list[Annotated[int, Field(ge=0, le=1)]] = 1
    """Every n-th layer has experts, or a list with 1 for those that have."""
    moe_ffn_hidden_size: PositiveInt | None = None
    """Width inside an expert; ffn_hidden_size if not given."""
    moe_token_dispatcher_type: Literal["allgather", "alltoall", "flex", "deepep"] = "deepep"
    """Who moves tokens to their experts; deepep is ep_kernels."""
    moe_router_topk: PositiveInt = 2
    """Experts for each token."""
    moe_router_load_balancing_type: LoadBalancing | list[LoadBalancing] = "aux_loss"
    """How tokens are spread over experts, or a list of losses, each with its coefficient."""
    moe_aux_loss_coeff: NonNegativeFloat | list[NonNegativeFloat] = 0.0
    """Weight of the load-balancing loss."""
    moe_z_loss_coeff: NonNegativeFloat | None = None
    """Weight of the z-loss on the router's logits."""
    moe_router_score_function: Literal["softmax", "sigmoid"] = "softmax"
    """From logits to scores."""
    moe_router_pre_softmax: bool = False
    """Softmax before the choice of experts."""
    moe_router_topk_scaling_factor: float | None = None
    """Factor on the chosen scores."""
    moe_router_num_groups: PositiveInt | None = None
    """Group-limited routing: number of groups of experts."""
    moe_router_group_topk: PositiveInt | None = None
    """Group-limited routing: groups that a token may use."""
    moe_router_enable_expert_bias: bool = False
    """Balance load by a bias on each expert's score, adjusted after every step."""
    moe_router_bias_update_rate: NonNegativeFloat = 1e-3
    """Step of that bias."""
    moe_router_dtype: Literal["fp32", "fp64"] | None = None
    """Type of the router's computations; that of the model if not given."""
    moe_shared_expert_intermediate_size: PositiveInt | None = None
    """Width inside the shared experts, which see every token; none without them."""
    moe_shared_expert_overlap: bool = False
    """Compute shared experts while tokens travel."""
    moe_expert_capacity_factor: float | None = Field(default=None, gt=0)
    """Tokens an expert takes, as a multiple of the average; further ones are dropped."""
    moe_pad_expert_input_to_capacity: bool = False
    """Give every expert exactly that number of rows."""
    moe_token_drop_policy: Literal["probs", "position"] = "probs"
    """Which tokens are dropped."""
    moe_grouped_gemm: bool = False
    """All experts of a rank in one GEMM; needs Transformer Engine."""
    moe_experts: Literal["auto", "sequential", "te", "torch"] = "auto"
    """Experts one by one, in Transformer Engine's grouped GEMM or, with deepep, in torch's; auto is
    te with moe_grouped_gemm, torch with ep.capacity_factor, else sequential."""
    moe_permute_fusion: bool = False
    """Fused permutation in Megatron's own dispatchers; needs Transformer Engine."""


class TrainingSection(Section):
    """The course of the training."""

    train_iters: PositiveInt = 200
    """Steps in total, including those before a resume."""
    micro_batch_size: PositiveInt = 4
    """Sequences in one forward pass of a rank."""
    global_batch_size: PositiveInt | None = None
    """Sequences in one step of all ranks; micro_batch_size * data parallel size if not given."""
    eval_interval: PositiveInt | None = None
    """Evaluate after this many steps; never if not given."""
    eval_iters: PositiveInt = 10
    """Global batches in one evaluation; always the same ones."""
    seed: NonNegativeInt = 1234
    """Of weights, data order and dropout."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto is cuda where it is available."""
    exit_interval: PositiveInt | None = None
    """Save and stop when the step is a multiple of this."""
    exit_duration_in_mins: float | None = Field(default=None, gt=0)
    """Save and stop after this time."""
    exit_signal_handler: bool = True
    """On SIGTERM or SIGUSR1 save after the current step and stop."""
    check_for_nan_in_grad: bool = True
    """Stop with an error when a gradient is not finite."""


class OptimizerSection(Section):
    """The optimizer."""

    optimizer: Literal["adam", "sgd"] = "adam"
    """adam is AdamW."""
    lr: float = Field(default=1e-3, gt=0)
    """Highest learning rate."""
    min_lr: NonNegativeFloat = 0.0
    """Learning rate at the end."""
    weight_decay: NonNegativeFloat = 0.1
    """Weight decay; biases and normalisations have none."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the mean of gradients."""
    adam_beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the mean of squared gradients."""
    adam_eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the latter."""
    sgd_momentum: NonNegativeFloat = 0.9
    """Momentum of sgd."""
    clip_grad: NonNegativeFloat = 1.0
    """Largest norm of the gradient; 0 does not clip."""
    initial_loss_scale: float = Field(default=2.0**32, gt=0)
    """First loss scale with fp16."""


class LRScheduleSection(Section):
    """The learning-rate schedule."""

    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "cosine"
    """Shape of the decay."""
    lr_decay_iters: PositiveInt | None = None
    """Steps until min_lr; train_iters if not given."""
    lr_warmup_iters: NonNegativeInt = 0
    """Steps of linear warm-up."""
    lr_warmup_init: NonNegativeFloat = 0.0
    """Learning rate at the start of the warm-up."""
    lr_wsd_decay_style: Literal["linear", "cosine", "exponential", "minus_sqrt"] = "exponential"
    """Shape of the last part of WSD."""
    lr_wsd_decay_iters: PositiveInt | None = None
    """Steps of the last part of WSD."""
    override_opt_param_scheduler: bool = False
    """On resume, go on with the schedule given here; else it must be that of the checkpoint."""


class DataSection(Section):
    """The training data."""

    data_path: list[str] = []
    """Prefixes of .bin/.idx files, optionally each preceded by its weight."""
    split: str = "95,5,0"
    """Shares of training, validation and test data."""
    data_cache_path: str | None = None
    """Where Megatron's index files go; next to the data if not given."""
    num_workers: NonNegativeInt = 0
    """Processes that load data; 0 loads in the training process."""
    reset_position_ids: bool = False
    """Count learned positions from the start of each document."""
    reset_attention_mask: bool = False
    """Hide earlier documents of the same sequence; with Megatron-Core's own layers."""
    eod_mask_loss: bool = False
    """No loss on end-of-document tokens."""
    num_dataset_builder_threads: PositiveInt = 1
    """Threads that open data sets."""


class TokenizerSection(Section):
    """The tokenizer that made the data."""

    tokenizer_type: Literal["byte", "huggingface"] = "byte"
    """byte is built in; huggingface needs the package transformers or tokenizers."""
    tokenizer_model: str | None = None
    """Directory, tokenizer.json or hub name of a huggingface tokenizer."""
    eod_token: str | None = None
    """Token that ends documents; that of the tokenizer if not given."""
    vocab_size: PositiveInt | None = None
    """Token ids that the model has room for; those of the tokenizer if not given."""


class CheckpointSection(Section):
    """Checkpoints."""

    save: str | None = None
    """Directory to save to; no checkpoints if not given."""
    load: str | None = None
    """Directory to resume from; `save` if not given."""
    save_interval: PositiveInt | None = None
    """Save after this many steps; only at the end if not given."""
    save_at_end: bool = True
    """Save after the last step."""
    keep_last: PositiveInt | None = None
    """Keep this many checkpoints; all if not given."""
    auto_resume: bool = True
    """Start from the latest checkpoint where there is one; one in `save` comes before `load`."""
    ckpt_step: PositiveInt | None = None
    """Start from the checkpoint of this step in `load`."""
    no_load_optim: bool = False
    """Do not restore the optimizer."""
    no_load_rng: bool = False
    """Do not restore random states."""
    finetune: bool = False
    """Load the model only, from `load`, and start at step 0."""
    dist_ckpt_optim_fully_reshardable: bool = False
    """Save the distributed optimizer so that other parallel sizes can load it (slower)."""

    @property
    def loads_from_elsewhere(self) -> bool:
        """Whether `load` names another directory than `save`."""
        if self.load is None or self.save is None:
            return self.load is not None
        return Path(self.load).resolve() != Path(self.save).resolve()


class LoggingSection(Section):
    """What is reported."""

    log_interval: PositiveInt = 1
    """Report after this many steps."""
    metrics_file: str | None = None
    """JSON lines, one for each report; <save>/metrics.jsonl if not given and save is."""
    tensorboard_dir: str | None = None
    """TensorBoard log; none if not given."""
    progress_bar: bool = True
    """Show one on rank 0."""
    moe_per_layer_logging: bool = True
    """Report the load of experts for each layer."""
    trace: str | None = None
    """Timeline of transfers and experts in some steps, a JSON file for Perfetto."""
    trace_first_step: PositiveInt = 5
    """First step of the timeline."""
    trace_num_steps: PositiveInt = 3
    """Steps of the timeline."""


class EPSection(Section):
    """Options of ep_kernels, used by the dispatcher deepep; flags start with --ep-."""

    num_sms: PositiveInt | None = None
    """SMs of a GPU or threads of a CPU for each transfer."""
    timeout_s: float | None = Field(default=None, gt=0)
    """How long a rank waits for a silent peer."""
    pool_bytes: PositiveInt | None = None
    """Memory for results on each rank."""
    num_chunks: PositiveInt | Literal["auto"] = 1
    """Cut a micro-batch into so many parts, whose transfers overlap with the experts of others."""
    overlap_num_sms: PositiveInt | None = None
    """SMs of transfers that overlap with experts, whose GEMMs leave them free; num_sms, and GEMMs
    take all SMs, if not given."""
    overlap_weight_gradients: bool = False
    """In the backward, gradients of tokens travel back while those of the experts' weights are
    computed; needs moe.moe_experts = torch."""
    recompute_transfers: bool = False
    """Where Megatron recomputes a MoE layer, communicate again in place of keeping what arrived."""
    fp8_dispatch: bool = False
    """Rows travel to the experts as fp8 (e4m3, a scale for 128 channels); gradients do not."""
    capacity_factor: float | None = Field(default=None, gt=0)
    """Room for rows in a dispatch, as a multiple of those that the rank sends: the host then waits
    for no layer, and rows that find no room are lost. Room for all rows if not given."""
    results_in_pool: bool = False
    """On GPUs, the experts' last GEMM writes into the pool, so that combine copies nothing."""
    reference: bool = False
    """Use ep_kernels.reference (plain PyTorch) in place of the compiled library."""


class LaunchSection(Section):
    """How the run is started; scripts/slurm asks for these nodes."""

    num_nodes: PositiveInt = 1
    """Number of nodes."""
    ranks_per_node: PositiveInt | None = None
    """Ranks on each node, one for each GPU; whatever torchrun starts if not given."""


class Config(Section):
    """A training run; see the sections."""

    model: ModelSection = ModelSection()
    parallelism: ParallelismSection = ParallelismSection()
    moe: MoESection = MoESection()
    training: TrainingSection = TrainingSection()
    optimizer: OptimizerSection = OptimizerSection()
    lr_schedule: LRScheduleSection = LRScheduleSection()
    data: DataSection = DataSection()
    tokenizer: TokenizerSection = TokenizerSection()
    checkpoint: CheckpointSection = CheckpointSection()
    logging: LoggingSection = LoggingSection()
    ep: EPSection = EPSection()
    launch: LaunchSection = LaunchSection()
    transformer: dict[str, Any] = {}
    """Further fields of Megatron-Core's TransformerConfig."""


def sections() -> dict[str, type[Section]]:
    """The classes of the sections by name."""
    return {
        name: field.annotation
        for name, field in Config.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
    }
