"""vLLM 0.26's options that LLM does not have, with their defaults there (facts from vLLM's
EngineArgs and LLM).

config.py lets a script that spells out a default run, warns where an option only tunes speed (or
allows what is always allowed here: enable_sleep_mode), and refuses the rest.
"""

from typing import Any

SPEED_ONLY = frozenset(
    """
    aggregate_engine_logging async_engine compilation_config cudagraph_capture_sizes
    cudagraph_metrics disable_cascade_attn disable_chunked_mm_input disable_custom_all_reduce
    disable_hybrid_kv_cache_manager disable_log_requests disable_log_stats enable_chunked_prefill
    enable_flashinfer_autotune enable_layerwise_nvtx_tracing enable_logging_iteration_details
    enable_mfu_metrics enable_sleep_mode jit_monitor_mode jit_monitor_verbose kv_cache_metrics
    kv_cache_metrics_sample linear_backend long_prefill_token_threshold max_cudagraph_capture_size
    max_long_partial_prefills max_num_partial_prefills max_parallel_loading_workers moe_backend
    numa_bind numa_bind_cpus numa_bind_nodes optimization_level performance_mode
    prefill_schedule_interval prefix_caching_hash_algo renderer_num_workers
    safetensors_load_strategy safetensors_prefetch_block_size safetensors_prefetch_num_threads
    scheduler_reserve_full_isl show_hidden_metrics_for_version shutdown_timeout stream_interval
    swap_space use_tqdm_on_load watermark
    """.split()  # noqa: SIM905
)

_OFF_BY_NONE = """
    additional_config allowed_media_domains attention_config code_revision
    collect_detailed_traces cpu_distributed_timeout_seconds data_parallel_address data_parallel_rank
    data_parallel_rpc_port data_parallel_size_local data_parallel_start_rank default_mm_loras
    device_ids diffusion_config disable_nccl_for_dp_synchronization distributed_executor_backend
    distributed_timeout_seconds ec_transfer_config enable_bf16x3_router_gemm
    eplb_config gdn_prefill_backend hf_config_path io_processor_plugin
    ir_op_priority kernel_config kv_events_config kv_offloading_size kv_transfer_config
    limit_mm_per_prompt logits_processors lora_target_modules mamba_block_size mamba_config
    max_cpu_loras max_num_scheduled_tokens media_io_kwargs mm_encoder_attn_backend
    mm_encoder_attn_dtype mm_encoder_fp8_scale_path mm_encoder_fp8_scale_save_path
    mm_processor_kwargs model_class_overrides model_loader_extra_config
    offload_params otlp_traces_endpoint override_attention_dtype
    pooler_config prefix_match_unit quantization quantization_config
    reasoning_config reasoning_parser_plugin scheduler_cls served_model_name spec_method spec_model
    spec_tokens speculative_config structured_outputs_config video_pruning_rate
    weight_transfer_config cpu_offload_params ignore_patterns kv_cache_dtype_skip_layers
    """
_SPEED_SWITCHES = """
    aggregate_engine_logging cudagraph_metrics disable_chunked_mm_input disable_custom_all_reduce
    disable_log_requests enable_layerwise_nvtx_tracing enable_sleep_mode
    enable_logging_iteration_details enable_mfu_metrics jit_monitor_verbose kv_cache_metrics
    numa_bind
    """
_OFF_BY_FALSE = """
    allow_deprecated_quantization calculate_kv_scales data_parallel_external_lb
    data_parallel_hybrid_lb data_parallel_multi_port_external_lb disable_sliding_window
    enable_cumem_allocator enable_dbo enable_elastic_ep enable_ep_weight_filter enable_eplb
    enable_expert_parallel enable_lora enable_mamba_cache_stochastic_rounding
    enable_mixed_moe_lora_format enable_mm_embeds enable_mm_processor_stats enable_moe_shared_loras
    enable_prompt_embeds enable_return_routed_experts enable_tower_connector_lora
    fail_on_environ_validation fully_sharded_loras interleave_mm_strings kv_sharing_fast_prefill
    language_model_only mm_encoder_only ray_workers_use_nsight skip_mm_profiling
    specialize_active_lora tokens_only use_fp64_gumbel
    """
_OFF_BY_ONE = """
    data_parallel_size decode_context_parallel_size dcp_kv_cache_interleave_size
    cp_kv_cache_interleave_size max_loras nnodes offload_num_in_group offload_prefetch_step
    pipeline_parallel_size prefill_context_parallel_size
    """
_OFF_BY_ZERO = """
    cpu_offload_gb mamba_cache_philox_rounds mm_ipc_gpu_memory_gb node_rank offload_group_size
    ubatch_size
    """
_OFF_BY_AUTO = """
    config_format convert kv_cache_dtype lora_dtype mamba_cache_dtype
    mamba_ssm_cache_dtype model_impl offload_backend runner tokenizer_mode worker_cls
    """
_OFF_BY_EMPTY = "allowed_local_media_path model_weights reasoning_parser worker_extension_cls"

VLLM_DEFAULTS: dict[str, Any] = {
    **dict.fromkeys(SPEED_ONLY),
    **dict.fromkeys(_SPEED_SWITCHES.split(), False),
    **dict.fromkeys(_OFF_BY_NONE.split()),
    **dict.fromkeys(_OFF_BY_FALSE.split(), False),
    **dict.fromkeys(_OFF_BY_ONE.split(), 1),
    **dict.fromkeys(_OFF_BY_ZERO.split(), 0),
    **dict.fromkeys(_OFF_BY_AUTO.split(), "auto"),
    **dict.fromkeys(_OFF_BY_EMPTY.split(), ""),
    "disable_cascade_attn": True,
    "disable_log_stats": True,
    "optimization_level": 2,
    "enable_chunked_prefill": True,
    "jit_monitor_mode": "warn",
    "kv_cache_metrics_sample": 0.01,
    "linear_backend": "auto",
    "long_prefill_token_threshold": 0,
    "max_long_partial_prefills": 1,
    "max_num_partial_prefills": 1,
    "moe_backend": "auto",
    "performance_mode": "balanced",
    "prefill_schedule_interval": 1,
    "prefix_caching_hash_algo": "sha256",
    "renderer_num_workers": 1,
    "scheduler_reserve_full_isl": True,
    "shutdown_timeout": 0,
    "stream_interval": 1,
    "use_tqdm_on_load": True,
    "watermark": 0.0,
    "all2all_backend": "allgather_reducescatter",
    "data_parallel_backend": "mp",
    "dbo_decode_token_threshold": 32,
    "dbo_prefill_token_threshold": 512,
    "dcp_comm_backend": "ag_rs",
    "expert_placement_strategy": "linear",
    "kv_offloading_backend": "native",
    "logprobs_mode": "raw_logprobs",
    "mamba_backend": "triton",
    "mamba_cache_mode": "none",
    "master_addr": "127.0.0.1",
    "master_port": 29501,
    "max_logprobs": 20,
    "max_lora_rank": 16,
    "mm_encoder_fp8_scale_save_margin": 1.5,
    "mm_encoder_tp_mode": "weights",
    "mm_processor_cache_gb": 4,
    "mm_processor_cache_type": "lru",
    "mm_shm_cache_max_object_size_mb": 128,
    "mm_tensor_ipc": "direct_rpc",
    "pt_load_map_location": "cpu",
    "scheduling_policy": "fcfs",
}

# Values beside the defaults that ask for what we do anyway.
ALSO_FINE = {
    "config_format": "hf",
    "convert": "none",
    "distributed_executor_backend": "uni",
    "runner": "generate",
    "tokenizer_mode": "hf",
}

# Methods of vLLM's LLM that ours does not have, and what to do instead.
_POOLING = "it takes a pooling model, and those are not supported yet"
_WEIGHTS = "weights can't be updated in place yet: make a new LLM"
UNSUPPORTED_METHODS = {
    **dict.fromkeys(("encode", "embed", "classify", "score"), _POOLING),
    **dict.fromkeys(
        (
            "finish_weight_update",
            "init_weight_transfer_engine",
            "start_draft_weight_update",
            "start_weight_update",
            "update_weights",
        ),
        _WEIGHTS,
    ),
    "collective_rpc": "the worker is in this process: apply_model hands you the model",
    "reset_mm_cache": "prompts are text alone, there is no such cache",
}
