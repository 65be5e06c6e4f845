"""What becomes of every argument of `sgl.Engine`; see `compat.py` for how a name may fare."""

from jaxengine.compat import (
    NO_GRAMMAR,
    NO_LORA,
    NO_MEDIA,
    NO_MOE,
    NO_PD,
    NO_SESSIONS,
    ONE_DEVICE,
    STATS,
    XLA,
    honoured,
    ignored,
    mapped,
    refused,
    table,
)

NO_SERVER = "nothing is served over a port here; `jaxengine serve` has settings of its own"
NO_QUANTISATION = "quantised weights are not there yet; GGUF files are dequantised at load"
NO_SPECULATION = "speculative decoding is not there yet"

ENGINE_ARGUMENTS = table(
    honoured(
        """
        abort_on_priority_when_disabled allow_auto_truncate chat_template chunked_prefill_size
        context_length default_priority_value disable_priority_preemption disable_radix_cache
        download_dir dtype enable_priority_scheduling hf_chat_template_name
        incremental_streaming_output json_model_override_args load_format log_level
        max_queued_requests max_running_requests max_total_tokens mem_fraction_static model_path
        page_size preferred_sampling_params priority_scheduling_preemption_threshold random_seed
        revision sampling_defaults schedule_low_priority_values_first schedule_policy
        served_model_name skip_tokenizer_init stream_interval tokenizer_path trust_remote_code
        weight_version
        """
    ),
    ignored(
        NO_SERVER,
        """
        admin_api_key api_key completion_template enable_ssl_refresh fastapi_root_path
        file_storage_path grpc_mode host load_balance_method log_level_http port reasoning_parser
        skip_server_warmup ssl_ca_certs ssl_certfile ssl_keyfile ssl_keyfile_password
        tokenizer_metrics_allowed_custom_labels tokenizer_metrics_custom_labels_header
        tool_call_parser tool_server uvicorn_access_log_exclude_prefixes warmups
        """,
    ),
    ignored(
        "there is one process, which starts no others and installs no handlers",
        """
        custom_sigquit_handler dist_init_addr dist_timeout nccl_port numa_node sleep_on_idle
        soft_watchdog_timeout tokenizer_worker_num use_ray watchdog_timeout
        """,
    ),
    ignored(
        XLA,
        """
        attention_backend cuda_graph_bs cuda_graph_max_bs decode_attention_backend
        disable_cuda_graph disable_cuda_graph_padding disable_custom_all_reduce
        disable_flashinfer_autotune disable_flashinfer_cutlass_moe_fp4_allgather
        disable_piecewise_cuda_graph enable_attn_tp_input_scattered enable_cudagraph_gc
        enable_fused_qk_norm_rope enable_layerwise_nvtx_marker enable_mscclpp enable_nccl_nvls
        enable_p2p_check enable_profile_cuda_graph enable_symm_mem enable_torch_compile
        enable_torch_compile_debug_mode enable_torch_symm_mem enforce_piecewise_cuda_graph
        flashinfer_mla_disable_ragged fp4_gemm_runner_backend fp8_gemm_runner_backend
        enable_aiter_allreduce_fusion enable_flashinfer_allreduce_fusion model_impl
        nsa_decode_backend nsa_prefill_backend piecewise_cuda_graph_compiler
        piecewise_cuda_graph_max_tokens piecewise_cuda_graph_tokens prefill_attention_backend
        sampling_backend torch_compile_max_bs triton_attention_num_kv_splits
        triton_attention_reduce_in_fp32 triton_attention_split_tile_size
        """,
    ),
    ignored("JAX chooses the device: set JAX_PLATFORMS before it is imported", "device"),
    ignored(
        "the host is never in the decode loop: windows overlap, and their length is chosen",
        """
        disable_overlap_schedule enable_single_batch_overlap enable_two_batch_overlap
        num_continuous_decode_steps scheduler_recv_interval tbo_token_distribution_threshold
        """,
    ),
    ignored(
        "prompts are chunked and packed by `chunked_prefill_size` alone",
        """
        disable_chunked_prefix_cache enable_dynamic_chunking enable_mixed_chunk
        enable_pdmux enable_prefill_delayer max_prefill_tokens pdmux_config_path
        prefill_delayer_forward_passes_buckets prefill_delayer_max_delay_passes
        prefill_delayer_token_usage_low_watermark prefill_delayer_wait_seconds_buckets
        prefill_max_requests sm_group_num
        """,
    ),
    ignored(
        "prompts are always tokenised together",
        """
        disable_tokenizer_batch_decode dynamic_batch_tokenizer_batch_size
        dynamic_batch_tokenizer_batch_timeout enable_dynamic_batch_tokenizer
        enable_tokenizer_batch_encode tokenizer_mode
        """,
    ),
    ignored(
        "it is always on",
        """
        enable_cache_report enable_custom_logit_processor enable_fp32_lm_head enable_nan_detection
        enable_return_hidden_states return_hidden_states_mode
        """,
    ),
    ignored(
        STATS,
        """
        bucket_e2e_request_latency bucket_inter_token_latency bucket_time_to_first_token
        collect_tokens_histogram crash_dump_folder decode_log_interval enable_metrics
        enable_metrics_for_all_schedulers enable_request_time_stats_logging enable_trace
        export_metrics_to_file export_metrics_to_file_dir extra_metric_labels
        gc_warning_threshold_secs generation_tokens_buckets kv_events_config log_requests
        log_requests_format log_requests_level log_requests_target otlp_traces_endpoint
        prompt_tokens_buckets show_time_cost
        """,
    ),
    ignored(
        NO_MOE,
        """
        deepep_config deepep_mode disable_shared_experts_fusion elastic_ep_backend
        enable_elastic_expert_backup enable_eplb enable_expert_distribution_metrics
        enable_fused_moe_sum_all_reduce enable_return_routed_experts ep_dispatch_algorithm
        ep_num_redundant_experts ep_size eplb_algorithm eplb_min_rebalancing_utilization_threshold
        eplb_rebalance_layers_per_chunk eplb_rebalance_num_iterations
        expert_distribution_recorder_buffer_size expert_distribution_recorder_mode
        flashinfer_mxfp4_moe_precision init_expert_location kt_cpuinfer
        kt_max_deferred_experts_per_token kt_method kt_num_gpu_experts kt_threadpool_count
        kt_weight_path moe_a2a_backend moe_dense_tp_size moe_dp_size moe_runner_backend
        mooncake_ib_device
        """,
    ),
    ignored(
        "models here have full attention in every layer",
        """
        disable_hybrid_swa_memory enable_nsa_prefill_context_parallel linear_attn_backend
        linear_attn_decode_backend linear_attn_prefill_backend mamba_backend
        mamba_full_memory_ratio mamba_scheduler_strategy mamba_ssm_dtype mamba_track_interval
        max_mamba_cache_size nsa_prefill_cp_mode swa_full_tokens_ratio
        """,
    ),
    ignored(
        NO_MEDIA,
        """
        disable_fast_image_processor enable_adaptive_dispatch_to_encoder
        enable_broadcast_mm_inputs_process enable_mm_global_cache enable_multimodal
        enable_precise_embedding_interpolation enable_prefix_mm_cache encoder_transfer_backend
        encoder_urls keep_mm_feature_on_device limit_mm_data_per_request mm_attention_backend
        mm_enable_dp_encoder mm_max_concurrent_calls mm_per_request_timeout mm_process_config
        """,
    ),
    refused(ONE_DEVICE, "dp_size nnodes pp_size tp_size", off=1),
    refused(ONE_DEVICE + ", the one that CUDA_VISIBLE_DEVICES shows", "base_gpu_id"),
    ignored(
        ONE_DEVICE,
        """
        attn_cp_size enable_dp_attention enable_dp_lm_head gpu_id_step node_rank
        pp_async_batch_depth pp_max_micro_batch_size
        """,
    ),
    refused(NO_PD, "disaggregation_mode", off="null"),
    refused(NO_PD, "encoder_only language_only"),
    ignored(
        NO_PD,
        """
        disaggregation_bootstrap_port disaggregation_decode_enable_offload_kvcache
        disaggregation_decode_polling_interval disaggregation_ib_device
        disaggregation_transfer_backend num_reserved_decode_tokens
        """,
    ),
    refused(
        NO_QUANTISATION,
        """
        modelopt_checkpoint_restore_path modelopt_checkpoint_save_path modelopt_export_path
        modelopt_quant quantization quantization_param_path quantize_and_serve rl_quant_profile
        torchao_config
        """,
    ),
    refused("keys and values have the weights' dtype", "kv_cache_dtype", off="auto"),
    refused(NO_SPECULATION, "enable_multi_layer_eagle speculative_algorithm"),
    ignored(
        NO_SPECULATION,
        """
        decrypted_draft_config_file enable_draft_weights_cpu_backup speculative_accept_threshold_acc
        speculative_accept_threshold_single speculative_attention_mode
        speculative_draft_attention_backend speculative_draft_load_format
        speculative_draft_model_path speculative_draft_model_quantization
        speculative_draft_model_revision speculative_eagle_topk speculative_moe_a2a_backend
        speculative_moe_runner_backend speculative_ngram_branch_length speculative_ngram_capacity
        speculative_ngram_match_type speculative_ngram_max_bfs_breadth
        speculative_ngram_max_match_window_size speculative_ngram_min_bfs_breadth
        speculative_ngram_min_match_window_size speculative_num_draft_tokens speculative_num_steps
        speculative_token_map
        """,
    ),
    refused(NO_LORA, "enable_lora lora_paths"),
    ignored(
        NO_LORA,
        """
        enable_lora_overlap_loading lora_backend lora_eviction_policy lora_target_modules
        max_loaded_loras max_lora_chunk_size max_lora_rank max_loras_per_batch
        """,
    ),
    ignored(
        NO_GRAMMAR + "; a request that asks for it is refused",
        """
        constrained_json_disable_any_whitespace constrained_json_whitespace_pattern
        disable_outlines_disk_cache grammar_backend
        """,
    ),
    ignored(
        "the prefix cache lives on the device alone",
        """
        disable_hicache_numa_detect enable_hierarchical_cache enable_lmcache hicache_io_backend
        hicache_mem_layout hicache_ratio hicache_size hicache_storage_backend
        hicache_storage_backend_extra_config hicache_storage_prefetch_policy hicache_write_policy
        hierarchical_sparse_attention_extra_config radix_eviction_policy
        """,
    ),
    refused("weights stay on the device", "cpu_offload_gb"),
    ignored(
        "weights stay on the device",
        "offload_group_size offload_mode offload_num_in_group offload_prefetch_step",
    ),
    ignored(
        "`release_memory` always works, and keeps the weights on the host where they are wanted",
        "enable_memory_saver enable_weights_cpu_backup",
    ),
    refused("attention is never sparse", "enable_double_sparsity"),
    ignored(
        "attention is never sparse",
        """
        ds_channel_config_path ds_heavy_channel_num ds_heavy_channel_type ds_heavy_token_num
        ds_sparse_decode_threshold
        """,
    ),
    refused("there are no diffusion language models here", "dllm_algorithm dllm_algorithm_config"),
    ignored(NO_SESSIONS, "enable_streaming_session"),
    mapped(stream_output="incremental_streaming_output"),
    ignored(
        "pages are given as they are needed, and who runs may be preempted and recomputed",
        "schedule_conservativeness",
    ),
    ignored(
        "a checkpoint is a folder of safetensors or a GGUF file, mapped into memory and kept",
        """
        checkpoint_engine_wait_weights_before_ready delete_ckpt_after_loading
        model_loader_extra_config remote_instance_weight_loader_backend
        remote_instance_weight_loader_seed_instance_ip
        remote_instance_weight_loader_seed_instance_service_port
        remote_instance_weight_loader_send_weights_group_ports
        remote_instance_weight_loader_start_seed_via_transfer_engine weight_loader_disable_mmap
        """,
    ),
    refused(
        "load the arrays yourself and pass `params` and `model_config`", "custom_weight_loader"
    ),
    refused("files are neither decrypted nor checked", "decrypted_config_file model_checksum"),
    refused(
        "a sampler, `capture` and `return_hidden_states` see what a step computes",
        """
        debug_tensor_dump_inject debug_tensor_dump_input_file debug_tensor_dump_layers
        debug_tensor_dump_output_folder forward_hooks
        """,
    ),
    refused(
        "seeds are always honoured, but the last bits may depend on the batch",
        "enable_deterministic_inference rl_on_policy_target",
    ),
    refused("pass its fields instead: Engine(**dataclasses.asdict(server_args))", "server_args"),
    ignored(
        "one engine both generates and embeds; items are scored one by one",
        "is_embedding multi_item_scoring_delimiter",
    ),
)
"""Every argument of `sgl.Engine`."""
