"""SGLang's argument names, so that a script moves over unchanged.

Source: the `ServerArgs` of SGLang 0.5 as printed by its offline engine documentation.
"""

IGNORED_ARGUMENTS = frozenset(
    """
    admin_api_key api_key attention_backend attn_cp_size cuda_graph_bs cuda_graph_max_bs
    custom_sigquit_handler decode_attention_backend deepep_config deepep_mode device
    disable_cuda_graph disable_cuda_graph_padding disable_custom_all_reduce
    disable_flashinfer_autotune disable_flashinfer_cutlass_moe_fp4_allgather
    disable_hicache_numa_detect disable_overlap_schedule disable_piecewise_cuda_graph
    disable_tokenizer_batch_decode disaggregation_bootstrap_port
    disaggregation_decode_enable_offload_kvcache disaggregation_decode_polling_interval
    disaggregation_ib_device disaggregation_mode disaggregation_transfer_backend dist_init_addr
    dist_timeout dllm_algorithm dllm_algorithm_config dynamic_batch_tokenizer_batch_size
    dynamic_batch_tokenizer_batch_timeout elastic_ep_backend enable_aiter_allreduce_fusion
    enable_broadcast_mm_inputs_process enable_cudagraph_gc enable_custom_logit_processor
    enable_dp_attention enable_dp_lm_head enable_dynamic_batch_tokenizer
    enable_elastic_expert_backup enable_eplb enable_expert_distribution_metrics
    enable_flashinfer_allreduce_fusion enable_mm_global_cache enable_mscclpp
    enable_nan_detection enable_nccl_nvls enable_nsa_prefill_context_parallel enable_p2p_check
    enable_pdmux enable_prefix_mm_cache enable_profile_cuda_graph enable_return_hidden_states
    enable_single_batch_overlap enable_ssl_refresh enable_symm_mem enable_tokenizer_batch_encode
    enable_torch_compile enable_torch_compile_debug_mode enable_torch_symm_mem
    enable_two_batch_overlap encoder_only encoder_transfer_backend encoder_urls
    enforce_piecewise_cuda_graph ep_dispatch_algorithm ep_num_redundant_experts ep_size
    eplb_algorithm eplb_min_rebalancing_utilization_threshold eplb_rebalance_layers_per_chunk
    eplb_rebalance_num_iterations expert_distribution_recorder_buffer_size
    expert_distribution_recorder_mode fastapi_root_path file_storage_path
    flashinfer_mla_disable_ragged flashinfer_mxfp4_moe_precision fp4_gemm_runner_backend
    fp8_gemm_runner_backend grpc_mode host init_expert_location kt_cpuinfer
    kt_max_deferred_experts_per_token kt_method kt_num_gpu_experts kt_threadpool_count
    kt_weight_path linear_attn_backend linear_attn_decode_backend linear_attn_prefill_backend
    load_balance_method log_level_http mamba_backend mamba_full_memory_ratio
    mamba_scheduler_strategy mamba_ssm_dtype mamba_track_interval max_mamba_cache_size
    mm_attention_backend mm_enable_dp_encoder mm_max_concurrent_calls mm_per_request_timeout
    mm_process_config model_impl moe_a2a_backend moe_dense_tp_size moe_dp_size
    moe_runner_backend mooncake_ib_device nccl_port nnodes node_rank nsa_decode_backend
    nsa_prefill_backend nsa_prefill_cp_mode num_continuous_decode_steps numa_node
    pdmux_config_path piecewise_cuda_graph_compiler piecewise_cuda_graph_max_tokens
    piecewise_cuda_graph_tokens port pp_async_batch_depth pp_max_micro_batch_size pp_size
    prefill_attention_backend reasoning_parser remote_instance_weight_loader_backend
    remote_instance_weight_loader_seed_instance_ip
    remote_instance_weight_loader_seed_instance_service_port
    remote_instance_weight_loader_send_weights_group_ports
    remote_instance_weight_loader_start_seed_via_transfer_engine return_hidden_states_mode
    sampling_backend sampling_defaults scheduler_recv_interval skip_server_warmup sleep_on_idle
    sm_group_num soft_watchdog_timeout ssl_ca_certs ssl_certfile ssl_keyfile
    ssl_keyfile_password tbo_token_distribution_threshold tokenizer_worker_num tool_call_parser
    tool_server torch_compile_max_bs torchao_config triton_attention_num_kv_splits
    triton_attention_reduce_in_fp32 triton_attention_split_tile_size use_ray
    uvicorn_access_log_exclude_prefixes warmups watchdog_timeout
    """.split()
)
"""Mean nothing in one process on XLA (servers, CUDA graphs, process groups, torch back ends)."""

KNOWN_ARGUMENTS = IGNORED_ARGUMENTS | frozenset(
    """
    abort_on_priority_when_disabled allow_auto_truncate base_gpu_id bucket_e2e_request_latency
    bucket_inter_token_latency bucket_time_to_first_token chat_template
    checkpoint_engine_wait_weights_before_ready chunked_prefill_size collect_tokens_histogram
    completion_template constrained_json_disable_any_whitespace
    constrained_json_whitespace_pattern context_length cpu_offload_gb crash_dump_folder
    custom_weight_loader debug_tensor_dump_inject debug_tensor_dump_input_file
    debug_tensor_dump_layers debug_tensor_dump_output_folder decode_log_interval
    decrypted_config_file decrypted_draft_config_file default_priority_value
    delete_ckpt_after_loading disable_chunked_prefix_cache disable_fast_image_processor
    disable_hybrid_swa_memory disable_outlines_disk_cache disable_priority_preemption
    disable_radix_cache disable_shared_experts_fusion download_dir dp_size
    ds_channel_config_path ds_heavy_channel_num ds_heavy_channel_type ds_heavy_token_num
    ds_sparse_decode_threshold dtype enable_adaptive_dispatch_to_encoder
    enable_attn_tp_input_scattered enable_cache_report enable_deterministic_inference
    enable_double_sparsity enable_draft_weights_cpu_backup enable_dynamic_chunking
    enable_fp32_lm_head enable_fused_moe_sum_all_reduce enable_fused_qk_norm_rope
    enable_hierarchical_cache enable_layerwise_nvtx_marker enable_lmcache enable_lora
    enable_lora_overlap_loading enable_memory_saver enable_metrics
    enable_metrics_for_all_schedulers enable_mixed_chunk enable_multi_layer_eagle
    enable_multimodal enable_precise_embedding_interpolation enable_prefill_delayer
    enable_priority_scheduling enable_request_time_stats_logging enable_return_routed_experts
    enable_streaming_session enable_trace enable_weights_cpu_backup export_metrics_to_file
    export_metrics_to_file_dir extra_metric_labels forward_hooks gc_warning_threshold_secs
    generation_tokens_buckets gpu_id_step grammar_backend hf_chat_template_name
    hicache_io_backend hicache_mem_layout hicache_ratio hicache_size hicache_storage_backend
    hicache_storage_backend_extra_config hicache_storage_prefetch_policy hicache_write_policy
    hierarchical_sparse_attention_extra_config incremental_streaming_output is_embedding
    json_model_override_args keep_mm_feature_on_device kv_cache_dtype kv_events_config
    language_only limit_mm_data_per_request load_format log_level log_requests
    log_requests_format log_requests_level log_requests_target lora_backend lora_eviction_policy
    lora_paths lora_target_modules max_loaded_loras max_lora_chunk_size max_lora_rank
    max_loras_per_batch max_prefill_tokens max_queued_requests max_running_requests
    max_total_tokens mem_fraction_static model_checksum model_loader_extra_config model_path
    modelopt_checkpoint_restore_path modelopt_checkpoint_save_path modelopt_export_path
    modelopt_quant multi_item_scoring_delimiter num_reserved_decode_tokens offload_group_size
    offload_mode offload_num_in_group offload_prefetch_step otlp_traces_endpoint page_size
    preferred_sampling_params prefill_delayer_forward_passes_buckets
    prefill_delayer_max_delay_passes prefill_delayer_token_usage_low_watermark
    prefill_delayer_wait_seconds_buckets prefill_max_requests
    priority_scheduling_preemption_threshold prompt_tokens_buckets quantization
    quantization_param_path quantize_and_serve radix_eviction_policy random_seed revision
    rl_on_policy_target rl_quant_profile schedule_conservativeness
    schedule_low_priority_values_first schedule_policy served_model_name server_args
    show_time_cost skip_tokenizer_init speculative_accept_threshold_acc
    speculative_accept_threshold_single speculative_algorithm speculative_attention_mode
    speculative_draft_attention_backend speculative_draft_load_format
    speculative_draft_model_path speculative_draft_model_quantization
    speculative_draft_model_revision speculative_eagle_topk speculative_moe_a2a_backend
    speculative_moe_runner_backend speculative_ngram_branch_length speculative_ngram_capacity
    speculative_ngram_match_type speculative_ngram_max_bfs_breadth
    speculative_ngram_max_match_window_size speculative_ngram_min_bfs_breadth
    speculative_ngram_min_match_window_size speculative_num_draft_tokens speculative_num_steps
    speculative_token_map stream_interval stream_output swa_full_tokens_ratio
    tokenizer_metrics_allowed_custom_labels tokenizer_metrics_custom_labels_header
    tokenizer_mode tokenizer_path tp_size trust_remote_code weight_loader_disable_mmap
    weight_version
    """.split()
)
"""Every argument `sgl.Engine` takes."""

REFUSED_ARGUMENTS = frozenset(
    """
    cpu_offload_gb dp_size enable_lora is_embedding kv_cache_dtype lora_paths quantization
    server_args speculative_algorithm tp_size
    """.split()
)
"""Would change results or memory if they were ignored, so a set value is refused."""
