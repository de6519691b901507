"""What this extension assumes about vLLM: one test per assumption, from vLLM's source only, without an engine.

A failing test names the assumption; ``docs/developer/patches.md`` says which code relies on it, and why.
"""

from __future__ import annotations

import pytest

from tests.contracts.vllm_source import VllmSource
from vllm_nld.vllm_glue.image_requirements import OLDEST
from vllm_nld.vllm_glue.versions import FIXED_BITMASK_ROWS

SCHEDULER = "v1/core/sched/scheduler.py"
STEP = "v1/core/sched/output.py"
RUNNER = "v1/worker/gpu_model_runner.py"
REJECTION = "v1/sample/rejection_sampler.py"
EXTENDED_WORKER_METHODS = (
    "init_device",
    "initialize_from_config",
    "compile_or_warm_up_model",
    "execute_model",
    "sample_tokens",
)
ATTENTION = "model_executor/layers/attention/attention.py"


class TestRegistration:
    def test_architecture_has_config_hook(self, vllm: VllmSource) -> None:
        assert vllm.has("model_executor/models/config.py", "MODELS_CONFIG_MAP")
        assert "verify_and_update_config(self)" in vllm.text("config/vllm.py")

    def test_platform_chooses_worker_only_if_user_did_not(self, vllm: VllmSource) -> None:
        for file, worker in (("cpu", "cpu_worker.CPUWorker"), ("cuda", "gpu_worker.Worker")):
            text = vllm.text(f"platforms/{file}.py")
            assert "parallel_config.worker_cls == 'auto'" in text
            assert f"'vllm.v1.worker.{worker}'" in text

    def test_scheduler_can_be_chosen(self, vllm: VllmSource) -> None:
        assert "scheduler_cls" in vllm.fields("config/scheduler.py", "SchedulerConfig")

    def test_speculative_config_can_be_filled_in_before_its_check(self, vllm: VllmSource) -> None:
        assert vllm.has("config/speculative.py", "SpeculativeConfig.__post_init__")
        wanted = {"model", "num_speculative_tokens", "target_model_config"}
        assert wanted <= vllm.fields("config/speculative.py", "SpeculativeConfig")

    def test_one_method_accepts_all_requests(self, vllm: VllmSource) -> None:
        assert "params" in vllm.parameters("v1/engine/input_processor.py", "InputProcessor.process_inputs")

    def test_outputs_carry_a_dictionary_to_the_api_process(self, vllm: VllmSource) -> None:
        """Every output may have one, and where the API process merges outputs, the last one stays."""
        assert "kv_transfer_params" in vllm.fields("v1/engine/__init__.py", "EngineCoreOutput")
        processed = vllm.text("v1/engine/output_processor.py", "OutputProcessor.process_outputs")
        assert "kv_transfer_params = engine_core_output.kv_transfer_params" in processed
        made = vllm.text("v1/engine/output_processor.py", "RequestState._new_request_output")
        assert "kv_transfer_params=kv_transfer_params" in made
        merged = vllm.text("outputs.py", "RequestOutput.add")
        assert "self.kv_transfer_params = next_output.kv_transfer_params" in merged

    def test_two_methods_make_chat_responses(self, vllm: VllmSource) -> None:
        file, name = "entrypoints/openai/chat_completion/serving.py", "OpenAIServingChat"
        for method in ("chat_completion_stream_generator", "chat_completion_full_generator"):
            assert {"request", "result_generator", "tokenizer"} <= set(vllm.parameters(file, f"{name}.{method}"))
        stream = vllm.text(file, f"{name}.chat_completion_stream_generator")
        assert "yield f'data: {data}\\n\\n'" in stream
        protocol = "entrypoints/openai/chat_completion/protocol.py"
        assert "skip_special_tokens" in vllm.fields(protocol, "ChatCompletionRequest")
        assert "OpenAIBaseModel" in vllm.text(protocol, "ChatCompletionResponse")

    def test_engine_id_is_shared_by_its_processes(self, vllm: VllmSource) -> None:
        assert "instance_id" in vllm.fields("config/vllm.py", "VllmConfig")


class TestImages:
    @pytest.fixture(autouse=True)
    def leaves_tokens_to_processors(self, vllm: VllmSource) -> None:
        if vllm.release < OLDEST:
            pytest.skip("images are refused")

    def test_the_processor_is_asked_by_known_methods(self, vllm: VllmSource) -> None:
        file, name = "multimodal/processing/processor.py", "BaseMultiModalProcessor"
        known = {
            "_call_hf_processor": ["hf_data", "hf_kwargs"],
            "_get_mm_fields_config": ["hf_inputs", "hf_processor_mm_kwargs"],
            "_get_prompt_updates": ["mm_items", "hf_processor_mm_kwargs", "out_mm_kwargs"],
            "_apply_prompt_updates": ["token_ids", "mm_prompt_updates"],
            "get_dummy_inputs": ["seq_len", "mm_counts", "mm_options"],
        }
        assert {method: vllm.parameters(file, f"{name}.{method}") for method in known} == known
        assert "requires_tokenizer" in vllm.fields(file, name)

    def test_the_model_is_mistral_3_with_a_text_model_inside(self, vllm: VllmSource) -> None:
        text = vllm.text("model_executor/models/mistral3.py", "Mistral3ForConditionalGeneration")
        assert "hf_config=config.text_config" in text
        assert "self.vision_tower" in text and "self.multi_modal_projector" in text
        assert "eps=1e-05" in vllm.text("model_executor/models/mistral3.py", "Mistral3MultiModalProjector")

    def test_runners_call_it_with_embeddings(self, vllm: VllmSource) -> None:
        assert "input_ids = None" in vllm.text(RUNNER, "GPUModelRunner._prepare_mm_inputs")
        assert "self.model_config.supports_multimodal_inputs" in vllm.text("v1/worker/gpu/model_runner.py")
        assert vllm.has("config/model.py", "ModelConfig.supports_multimodal_inputs")

    def test_images_are_loaded_by_two_methods(self, vllm: VllmSource) -> None:
        text = vllm.text("multimodal/media/connector.py", "MediaConnector")
        assert " def fetch_image(self" in text and "async def fetch_image_async(self" in text

    def test_the_registry_inspects_a_model_by_a_method(self, vllm: VllmSource) -> None:
        assert vllm.has("model_executor/models/registry.py", "_LazyRegisteredModel.inspect_model_cls")
        assert "model.inspect_model_cls()" in vllm.text("model_executor/models/registry.py", "_try_inspect_model_cls")


class TestProposer:
    def test_class_path_makes_a_proposer(self, vllm: VllmSource) -> None:
        assert "user_class(vllm_config)" in vllm.text("v1/spec_decode/custom_class_proposer.py")
        assert "self.drafter = create_custom_proposer(" in vllm.text(RUNNER, "GPUModelRunner.__init__")

    def test_proposer_gets_the_lists_of_the_step(self, vllm: VllmSource) -> None:
        call = "propose(sampled_token_ids, self.input_batch.num_tokens_no_spec, self.input_batch.token_ids_cpu"
        assert call in vllm.text(RUNNER, "GPUModelRunner.propose_draft_token_ids")

    def test_proposer_limit_can_be_raised(self, vllm: VllmSource) -> None:
        assert "self.effective_drafter_max_model_len" in vllm.text(RUNNER, "GPUModelRunner._input_fits_in_drafter")

    def test_custom_proposer_uses_first_runner(self, vllm: VllmSource) -> None:
        text = vllm.text("config/vllm.py", "VllmConfig._get_v2_model_runner_unsupported_features")
        refused, allowed = "'custom_class'" in text, "speculative_config.method not in" in text
        assert refused or (allowed and "custom_class" not in text)

    def test_request_record_has_its_parameters(self, vllm: VllmSource) -> None:
        file = "v1/worker/gpu_input_batch.py"
        wanted = {"prompt_token_ids", "sampling_params", "num_computed_tokens", "output_token_ids", "lora_request"}
        assert wanted <= vllm.fields(file, "CachedRequestState")
        assert "self.num_prompt_tokens =" in vllm.text(file, "CachedRequestState.__post_init__")

    def test_one_method_runs_the_causal_pass(self, vllm: VllmSource) -> None:
        runner = "v1/worker/gpu_model_runner.py"
        assert vllm.parameters(runner, "GPUModelRunner._model_forward")[:4] == [
            "input_ids",
            "positions",
            "intermediate_tensors",
            "inputs_embeds",
        ]
        assert "self._model_forward(input_ids=input_ids" in vllm.text(runner, "GPUModelRunner.execute_model")
        context = vllm.fields("forward_context.py", "ForwardContext")
        assert {"attn_metadata", "slot_mapping", "cudagraph_runtime_mode"} <= context

    def test_one_method_sets_lora_ids(self, vllm: VllmSource) -> None:
        file = "v1/worker/lora_model_runner_mixin.py"
        wanted = ["prompt_lora_mapping", "token_lora_mapping", "lora_requests"]
        assert vllm.parameters(file, "LoRAModelRunnerMixin._set_active_loras")[:3] == wanted


class TestWorker:
    @pytest.mark.parametrize(
        "method",
        ["init_device", "initialize_from_config", "compile_or_warm_up_model", "execute_model", "sample_tokens"],
    )
    def test_worker_has_the_extended_methods(self, vllm: VllmSource, method: str) -> None:
        assert vllm.has("v1/worker/gpu_worker.py", f"Worker.{method}")

    def test_cpu_worker_subclasses_gpu_worker(self, vllm: VllmSource) -> None:
        assert "class CPUWorker(Worker)" in vllm.text("v1/worker/cpu_worker.py", "CPUWorker")

    def test_shared_memory_of_cpu_worker_patches_torch(self, vllm: VllmSource) -> None:
        """This is why nothing on the GPU path may import it. If this fails, that rule can go."""
        assert "torch.cuda.Event" in vllm.text("v1/worker/cpu/shm.py")


class TestSchedulerAndStep:
    def test_request_can_skip_a_step(self, vllm: VllmSource) -> None:
        text = vllm.text(SCHEDULER, "Scheduler.schedule")
        assert "self.current_step < request.next_decode_eligible_step" in text
        assert text.index("self.current_step += 1") < text.index("request.next_decode_eligible_step")

    def test_scheduler_without_drafts_pads_no_request(self, vllm: VllmSource) -> None:
        """Needed by ``padding.schedule_unpadded``: nothing else that plans a step reads the number of drafts."""
        text = vllm.text(SCHEDULER, "Scheduler.schedule")
        assert "self.num_spec_tokens > 0 and self.dynamic_sd_lookup is None" in text
        assert "num_spec_tokens_to_schedule = self.num_spec_tokens" in text
        assert "[-1] * self.num_spec_tokens" in text

    def test_drafts_are_stored_in_a_list_of_their_request(self, vllm: VllmSource) -> None:
        text = vllm.text(SCHEDULER, "Scheduler.schedule")
        assert "token_budget = self.max_num_scheduled_tokens" in text
        assert "request.num_tokens_with_spec + request.num_output_placeholders - request.num_computed_tokens" in text

    def test_bitmask_has_a_row_for_every_draft_and_one_more(self, vllm: VllmSource) -> None:
        """From 0.33 on, every request has an equal number of rows, of which the first ones are read."""
        assert {"structured_output_request_ids", "grammar_bitmask"} <= vllm.fields(STEP, "GrammarOutput")
        reader = vllm.text("v1/structured_output/utils.py", "apply_grammar_bitmask")
        if vllm.release < FIXED_BITMASK_ROWS:
            assert "cumulative_index += 1 + num_spec_tokens" in reader
        else:
            writer = vllm.text("v1/structured_output/__init__.py", "StructuredOutputManager.grammar_bitmask")
            assert "cumulative_index = grammar_idx * mask_stride" in writer
            assert "cumulative_index:cumulative_index + num_rows" in reader
            assert "cumulative_index += mask_stride" in reader

    def test_random_numbers_of_dropped_samples_are_taken_back(self, vllm: VllmSource) -> None:
        """Needed by ``cpu_repairs.repair_seeded_prefills``, which can go if there is no ``set_offset``."""
        text = vllm.text(RUNNER, "GPUModelRunner._bookkeeping_sync")
        assert "set_offset" in text
        assert "self.discard_request_mask.np[:num_reqs]" in text
        assert "self.input_batch.generators.get(" in text

    def test_step_has_the_fields_that_are_read(self, vllm: VllmSource) -> None:
        wanted = {
            "num_scheduled_tokens",
            "total_num_scheduled_tokens",
            "scheduled_spec_decode_tokens",
            "finished_req_ids",
            "preempted_req_ids",
        }
        assert wanted <= vllm.fields(STEP, "SchedulerOutput")

    def test_steps_and_results_accept_a_note(self, vllm: VllmSource) -> None:
        for file, name in ((STEP, "SchedulerOutput"), ("v1/outputs.py", "ModelRunnerOutput")):
            assert "slots=True" not in vllm.text(file, name)

    def test_drafts_can_be_updated_after_a_step(self, vllm: VllmSource) -> None:
        assert vllm.parameters(SCHEDULER, "Scheduler.update_draft_token_ids") == ["draft_token_ids"]
        assert {"req_ids", "draft_token_ids"} <= vllm.fields("v1/outputs.py", "DraftTokenIds")

    def test_one_method_passes_results_to_the_scheduler(self, vllm: VllmSource) -> None:
        wanted = ["scheduler_output", "model_runner_output"]
        assert vllm.parameters(SCHEDULER, "Scheduler.update_from_output") == wanted


class TestSampling:
    def test_rejection_sampler_forward_has_known_arguments(self, vllm: VllmSource) -> None:
        wanted = ["metadata", "draft_probs", "logits", "sampling_metadata"]
        assert vllm.parameters(REJECTION, "RejectionSampler.forward") == wanted

    def test_logits_processors_are_applied_by_a_method(self, vllm: VllmSource) -> None:
        wanted = ["logits", "sampling_metadata", "metadata"]
        assert vllm.parameters(REJECTION, "RejectionSampler.apply_logits_processors") == wanted

    def test_thinking_budgets_are_applied_by_two_methods(self, vllm: VllmSource) -> None:
        wanted = ["logits", "sampling_metadata", "predict_bonus_token"]
        assert vllm.parameters("v1/sample/sampler.py", "Sampler.forward")[:3] == wanted
        holder = "ThinkingBudgetStateHolder"
        wanted = ["logits", "predict_bonus_token", "spec_token_ids"]
        assert vllm.parameters("v1/sample/thinking_budget_state.py", f"{holder}.apply_to_logits") == wanted
        plain = vllm.text("v1/sample/sampler.py", "Sampler.apply_logits_processors")
        assert "holder.update_state(" in plain and "holder.apply_to_logits(" in plain
        drafts = vllm.text(REJECTION, "RejectionSampler.apply_logits_processors")
        assert "holder.update_state(" not in drafts and "holder.apply_to_logits(" in drafts

    def test_expand_batch_to_tokens_has_known_signature(self, vllm: VllmSource) -> None:
        wanted = ["x", "cu_num_tokens", "num_tokens", "replace_from", "replace_to"]
        assert vllm.parameters(REJECTION, "expand_batch_to_tokens") == wanted

    def test_rejection_sampler_has_known_limits(self, vllm: VllmSource) -> None:
        assert vllm.has(REJECTION, "MAX_SPEC_LEN")
        assert "PLACEHOLDER_TOKEN_ID: tl.constexpr = -1" in vllm.text(REJECTION)

    def test_fields_that_change_greedy_logits_are_known(self, vllm: VllmSource) -> None:
        """``sampling.decides_by_argmax`` must know every field, because a new one may need more than an argmax."""
        known = {
            "temperature",
            "all_greedy",
            "all_random",
            "top_p",
            "top_k",
            "generators",
            "max_num_logprobs",
            "no_penalties",
            "prompt_token_ids",
            "frequency_penalties",
            "presence_penalties",
            "repetition_penalties",
            "output_token_ids",
            "allowed_token_ids_mask",
            "bad_words_token_ids",
            "logitsprocs",
            "logprob_token_ids",
            "spec_token_ids",
            "thinking_budget_state_holder",
        }
        assert vllm.fields("v1/sample/metadata.py", "SamplingMetadata") <= known

    def test_top_k_and_top_p_are_applied_by_one_function(self, vllm: VllmSource) -> None:
        wanted = ["logits", "k", "p"]
        assert vllm.parameters("v1/sample/ops/topk_topp_sampler.py", "apply_top_k_top_p")[:3] == wanted


class TestModelAndAttention:
    def test_layer_accepts_a_backend(self, vllm: VllmSource) -> None:
        assert "attn_backend" in vllm.parameters(ATTENTION, "Attention.__init__")

    def test_empty_slot_mapping_writes_nothing(self, vllm: VllmSource) -> None:
        text = vllm.text(ATTENTION, "unified_kv_cache_update")
        assert "if layer_slot_mapping is not None:" in text
        assert "slot_mapping" in vllm.parameters("forward_context.py", "set_forward_context")

    def test_backend_says_whether_its_forward_writes_the_cache(self, vllm: VllmSource) -> None:
        assert "forward_includes_kv_cache_update" in vllm.fields("v1/attention/backend.py", "AttentionBackend")

    def test_implementation_has_a_method_that_writes_the_cache(self, vllm: VllmSource) -> None:
        wanted = ["layer", "key", "value", "kv_cache", "slot_mapping"]
        for backend, name in (
            ("flash_attn.py", "FlashAttentionImpl"),
            ("triton_attn.py", "TritonAttentionImpl"),
            ("cpu_attn.py", "CPUAttentionBackendImpl"),
        ):
            assert vllm.parameters(f"v1/attention/backends/{backend}", f"{name}.do_kv_cache_update") == wanted

    def test_builder_gets_the_block_table_of_every_step(self, vllm: VllmSource) -> None:
        for backend, name in (
            ("flash_attn.py", "FlashAttentionMetadataBuilder"),
            ("triton_attn.py", "TritonAttentionMetadataBuilder"),
            ("cpu_attn.py", "CPUAttentionMetadataBuilder"),
        ):
            file = f"v1/attention/backends/{backend}"
            wanted = ["common_prefix_len", "common_attn_metadata", "fast_build"]
            assert vllm.parameters(file, f"{name}.build") == wanted

    def test_llama_accepts_other_attention_and_layer_classes(self, vllm: VllmSource) -> None:
        file = "model_executor/models/llama.py"
        assert "attn_layer_type" in vllm.parameters(file, "LlamaDecoderLayer.__init__")
        assert "layer_type" in vllm.parameters(file, "LlamaForCausalLM.__init__")

    def test_llama_embeds_and_computes_in_known_parts(self, vllm: VllmSource) -> None:
        """A mask token's row goes into ``embed_input_ids``; an adapter's MLP takes over ``LlamaMLP``'s parts."""
        file = "model_executor/models/llama.py"
        assert {"vllm_config", "prefix", "layer_type"} <= set(vllm.parameters(file, "LlamaForCausalLM._init_model"))
        assert {"vllm_config", "prefix", "layer_type"} <= set(vllm.parameters(file, "LlamaModel.__init__"))
        assert "self.embed_input_ids(input_ids)" in vllm.text(file, "LlamaModel.forward")
        made = vllm.text(file, "LlamaMLP.__init__")
        assert all(f"self.{part} = " in made for part in ("gate_up_proj", "down_proj", "act_fn"))
        reduces = vllm.text("model_executor/layers/linear.py", "RowParallelLinear.forward")
        assert "if self.reduce_results and self.tp_size > 1" in reduces

    def test_yarn_attention_scaling_can_be_turned_off(self, vllm: VllmSource) -> None:
        file = "model_executor/layers/rotary_embedding/__init__.py"
        text = vllm.text(file)
        assert "apply_yarn_scaling" in text or "attention_factor" in text

    def test_vocabulary_columns_of_a_shard_are_known(self, vllm: VllmSource) -> None:
        file = "model_executor/layers/vocab_parallel_embedding.py"
        wanted = {"org_vocab_start_index", "org_vocab_end_index"}
        defined = {name for name in wanted if vllm.has(file, f"VocabParallelEmbeddingShardIndices.{name}")}
        assert wanted <= defined | vllm.fields(file, "VocabParallelEmbeddingShardIndices")
