"""What this extension assumes about vLLM's second model runner (V2): one test an assumption, from its source only."""

from __future__ import annotations

import ast

import pytest

from tests.contracts.vllm_source import VllmSource
from vllm_nld.vllm_glue.versions import BAD_WORDS_SEE_DRAFTS

CONFIG = "config/vllm.py"
RUNNER = "v1/worker/gpu/model_runner.py"
SPECULATORS = "v1/worker/gpu/spec_decode"
SCHEDULER = "v1/core/sched/async_scheduler.py"
STATE = "v1/worker/gpu/model_states"
BATCH = "v1/worker/gpu/input_batch.py"


class TestForcedPreemption:
    def test_outputs_are_dropped_by_places_only_in_old_versions(self, vllm: VllmSource) -> None:
        """``forced_preemption.StepsInFlight`` corrects a number that later versions do not have."""
        text = vllm.text("v1/core/sched/scheduler.py", "Scheduler.reset_prefix_cache")
        assert "while self.running:" in text
        by_places = "request.async_tokens_to_discard = request.num_output_placeholders" in text
        assert by_places != ("drop_stale_output=True" in text)
        if by_places:
            dropped = vllm.text(SCHEDULER, "AsyncScheduler._update_request_with_output")
            assert "if request.async_tokens_to_discard > 0:" in dropped
            assert "request.async_tokens_to_discard -= 1" in dropped


class TestChoice:
    def test_what_the_second_runner_lacks_is_listed_by_one_method(self, vllm: VllmSource) -> None:
        """``second_runner.allow_self_speculation`` takes one entry out of the list."""
        text = vllm.text(CONFIG, "VllmConfig._get_v2_model_runner_unsupported_features")
        assert "speculative method '{speculative_config.method}'" in text
        assert "return unsupported" in text
        chosen = vllm.text(CONFIG, "VllmConfig.use_v2_model_runner")
        assert "envs.VLLM_USE_V2_MODEL_RUNNER" in chosen
        assert "self._get_v2_model_runner_unsupported_features()" in chosen
        assert "unsupported" in vllm.text(CONFIG, "VllmConfig._validate_v2_model_runner")

    def test_a_dense_model_takes_it(self, vllm: VllmSource) -> None:
        """Until 0.28 a model may also be on a list; dense ones need not."""
        if vllm.has(CONFIG, "VllmConfig._is_default_v2_model_runner_model"):
            text = vllm.text(CONFIG, "VllmConfig._is_default_v2_model_runner_model")
            assert "or not model_config.is_moe" in text

    def test_asynchronous_scheduling_is_decided_while_a_config_is_filled_in(self, vllm: VllmSource) -> None:
        """``second_runner.allow_asynchronous_scheduling`` answers after it: nothing in it depends on the answer."""
        tree = ast.parse(vllm.text(CONFIG, "VllmConfig.__post_init__"))
        tests = [ast.unparse(node.test) for node in ast.walk(tree) if isinstance(node, ast.If | ast.IfExp)]
        switch = "self.scheduler_config.async_scheduling"
        others = [test for test in tests if switch in test and test not in (switch, f"{switch} is None")]
        # Without cascades, which our hook sees to; and the scheduler of vLLM's own diffusion models.
        assert all("disable_cascade_attn" in test or "diffusion_config" in test for test in others)
        assert "disable_nccl_for_dp_synchronization" in ast.unparse(tree)

    def test_executors_say_whether_they_schedule_asynchronously(self, vllm: VllmSource) -> None:
        assert vllm.has("v1/executor/abstract.py", "Executor.supports_async_scheduling")


class TestGraphs:
    def test_planned_graphs_and_what_steps_choose_from(self, vllm: VllmSource) -> None:
        """``second_runner.add_graphs_of_single_tokens`` adds to both before the runner captures."""
        path = "v1/worker/gpu/cudagraph_utils.py"
        plan = vllm.text(path, "CudaGraphManager._init_candidates")
        assert "self._capture_descs[mode] = descs" in plan
        assert "self._candidates" in plan
        assert "uniform_token_count=decode_query_len" in plan
        assert "descs = self._capture_descs[mode]" in vllm.text(path, "CudaGraphManager.capture")
        choice = vllm.text(path, "CudaGraphManager.dispatch")
        assert "for desc in self._candidates[key]" in choice
        assert {"num_tokens", "num_reqs", "uniform_token_count", "num_active_loras"} <= vllm.fields(
            path, "BatchExecutionDescriptor"
        )
        assert "self.cudagraph_manager.capture(" in vllm.text(RUNNER, "GPUModelRunner.capture_model")


class TestWords:
    def test_bad_words_see_drafts(self, vllm: VllmSource) -> None:
        """Until 0.27, a place before the drafts is compared instead: ``RequestTable`` drafts nothing there."""
        text = vllm.text("v1/worker/gpu/sample/bad_words.py", "_bad_words_kernel")
        assert ("spec_offset + 1" in text) == (vllm.release >= BAD_WORDS_SEE_DRAFTS)
        assert "cur_req_first_pos + spec_offset" in text


class TestSpeculator:
    def test_the_runner_calls_its_factory_by_its_own_name(self, vllm: VllmSource) -> None:
        assert vllm.parameters(f"{SPECULATORS}/__init__.py", "init_speculator")[:2] == ["vllm_config", "device"]
        assert "self.speculator = init_speculator(self.vllm_config, self.device" in vllm.text(RUNNER)

    def test_what_it_proposes_from(self, vllm: VllmSource) -> None:
        wanted = [
            "input_batch",
            "attn_metadata",
            "slot_mappings",
            "last_hidden_states",
            "aux_hidden_states",
            "num_sampled",
            "num_rejected",
            "last_sampled",
            "next_prefill_tokens",
            "temperature",
            "seeds",
        ]
        parameters = vllm.parameters(f"{SPECULATORS}/speculator.py", "BaseSpeculator.propose")
        assert parameters[: len(wanted)] == wanted
        assert {"dummy_run", "skip_attn_for_dummy_run", "is_profile"} <= set(parameters)

    def test_it_is_asked_for_nothing_else(self, vllm: VllmSource) -> None:
        """The runner's uses of ``self.speculator``; those of a draft model's speculator follow a type check."""
        known = {
            "propose", "capture", "init_cudagraph_manager", "draft_logits", "supports_mm_inputs", "pcp_manager",
            "model", "num_query_per_req", "num_extra_query_per_req", "prepare_watermarking",
            "draft_token_confidence_probs",
        }  # fmt: skip
        of_draft_models = {
            "load_model", "set_attn", "draft_attn_layer_names", "dcp_size", "observe_verification", "set_eplb_state",
        }  # fmt: skip
        asked = {
            node.attr
            for node in ast.walk(ast.parse(vllm.text(RUNNER)))
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self.speculator"
        }
        assert asked <= known | of_draft_models

    def test_drafts_are_put_away_by_request(self, vllm: VllmSource) -> None:
        text = vllm.text(RUNNER, "GPUModelRunner.sample_tokens")
        assert "self.req_states.draft_tokens[input_batch.idx_mapping] = draft_tokens" in text

    def test_the_graphs_are_planned_when_the_block_tables_are_there(self, vllm: VllmSource) -> None:
        text = vllm.text(RUNNER, "GPUModelRunner.initialize_kv_cache")
        assert text.index("self.block_tables = BlockTables(") < text.index("init_cudagraph_manager(cudagraph_mode)")

    def test_a_batch_says_what_is_read_from_it(self, vllm: VllmSource) -> None:
        wanted = {
            "num_reqs",
            "idx_mapping",
            "idx_mapping_np",
            "seq_lens",
            "seq_lens_cpu_upper_bound",
            "num_computed_tokens_np",
            "num_scheduled_tokens",
            "num_tokens_after_padding",
            "prefill_len_np",
            "query_start_loc",
        }
        assert wanted <= vllm.fields(BATCH, "InputBatch")

    def test_a_step_may_be_longer_than_its_batch(self, vllm: VllmSource) -> None:
        """``speculator.branching`` adds tokens to a step: its state makes the metadata, and slots beyond it are -1."""
        made = vllm.parameters(f"{STATE}/default.py", "DefaultModelState.prepare_attn")
        assert [name for name in made if name != "self"][:3] == ["input_batch", "cudagraph_mode", "block_tables"]
        assert "for_capture" in made
        slots = vllm.text("v1/worker/gpu/block_table.py", "_compute_slot_mappings_kernel")
        assert "range(actual_num_tokens, max_num_tokens" in slots and "PAD_ID" in slots
        assert "self.slot_mappings" in vllm.text("v1/worker/gpu/block_table.py", "BlockTables.__init__")
        found = vllm.parameters("v1/worker/gpu/cudagraph_utils.py", "CudaGraphManager.dispatch")
        assert [name for name in found if name != "self"][:2] == ["num_reqs", "num_tokens"]
        step = vllm.text(RUNNER, "GPUModelRunner.execute_model")
        assert "self.model(**model_inputs)" in step and "slot_mapping=slot_mappings_by_layer" in step

    def test_block_tables_are_kept_by_the_batch_s_rows(self, vllm: VllmSource) -> None:
        text = vllm.text("v1/worker/gpu/block_table.py", "BlockTables.__init__")
        assert "self.input_block_tables" in text and "self.block_sizes = block_sizes" in text

    def test_host_tables_reach_the_device(self, vllm: VllmSource) -> None:
        text = vllm.text("v1/worker/gpu/buffer_utils.py", "UvaBackedTensor")
        assert all(part in text for part in ("self.np", "self.gpu", "def copy_to_uva"))
        assert vllm.parameters("utils/torch_utils.py", "async_tensor_h2d")[:2] == ["data", "device"]

    def test_a_token_s_noise_is_drawn_by_one_function(self, vllm: VllmSource) -> None:
        wanted = ["logits", "expanded_idx_mapping", "temperature", "seed", "pos", "apply_temperature"]
        parameters = vllm.parameters("v1/worker/gpu/sample/gumbel.py", "gumbel_sample")
        assert parameters[: len(wanted)] == wanted
        assert "use_fp64" in parameters

    def test_draft_logits_are_divided_where_they_are_kept_as_they_are(self, vllm: VllmSource) -> None:
        """``second_runner.divides_draft_logits``."""
        parameters = vllm.parameters("v1/worker/gpu/sample/gumbel.py", "gumbel_sample")
        divides = "/ temp" in vllm.text(f"{SPECULATORS}/rejection_sampler_utils.py", "_resample_kernel")
        assert divides == ("logits_cache" in parameters)

    def test_graphs_are_captured_by_a_manager(self, vllm: VllmSource) -> None:
        file = "v1/worker/gpu/cudagraph_utils.py"
        wanted = ["vllm_config", "device", "cudagraph_mode", "decode_query_len"]
        assert vllm.parameters(file, "CudaGraphManager.__init__")[:4] == wanted
        assert vllm.parameters(file, "CudaGraphManager.capture") == ["create_forward_fn", "progress_bar_desc"]
        assert "create_forward_fn(desc, warmup=True)" in vllm.text(file, "CudaGraphManager.capture")
        assert "self.graphs[desc] = graph" in vllm.text(file, "CudaGraphManager.capture")
        assert "self.graphs[desc].replay()" in vllm.text(file, "CudaGraphManager.run_fullgraph")
        assert {"num_reqs", "num_tokens"} <= vllm.fields(file, "BatchExecutionDescriptor")


class TestVerification:
    def test_a_model_may_bring_its_state_and_its_samplers(self, vllm: VllmSource) -> None:
        assert "model.get_model_state_cls()" in vllm.text(f"{STATE}/__init__.py")
        assert vllm.parameters(f"{STATE}/interface.py", "ModelState.add_request") == ["req_index", "new_req_data"]
        assert vllm.parameters(f"{STATE}/interface.py", "ModelState.custom_sampler") == ["sampler"]
        wanted = ["vllm_config", "model", "encoder_cache", "device"]
        assert vllm.parameters(f"{STATE}/default.py", "DefaultModelState.__init__") == wanted
        assert "self.model_state.custom_sampler(self.sampler)" in vllm.text(RUNNER)

    def test_the_speculator_is_made_before_the_model_s_state(self, vllm: VllmSource) -> None:
        assert "init_speculator(" in vllm.text(RUNNER, "GPUModelRunner.__init__")
        assert "init_model_state(" in vllm.text(RUNNER, "GPUModelRunner.load_model")

    def test_the_rejection_sampler_calls_one_function_by_its_own_name(self, vllm: VllmSource) -> None:
        from vllm_nld.vllm_glue.second_runner import VERIFIED

        parameters = vllm.parameters(f"{SPECULATORS}/rejection_sampler_utils.py", "rejection_sample")
        assert tuple(parameters[: len(VERIFIED)]) == VERIFIED
        file = f"{SPECULATORS}/rejection_sampler.py"
        assert "sampled, num_sampled = rejection_sample(processed_logits, draft_logits," in vllm.text(file)
        parameters = vllm.parameters(file, "RejectionSampler.__call__")
        assert parameters[:3] == ["logits", "input_batch", "draft_logits"]
        assert vllm.parameters(file, "RejectionSampler.__init__")[:3] == ["sampler", "spec_config", "device"]

    def test_a_draft_lies_behind_the_logits_that_verify_it(self, vllm: VllmSource) -> None:
        text = vllm.text(f"{SPECULATORS}/rejection_sampler_utils.py")
        assert "tl.load(draft_sampled_ptr + logit_idx + 1)" in text

    def test_steps_without_drafts_take_the_plain_sampler(self, vllm: VllmSource) -> None:
        """``NLDSampler`` shares its state, and changes what it samples."""
        assert "sampler_output = self.sampler(logits, input_batch)" in vllm.text(RUNNER)
        file = "v1/worker/gpu/sample/sampler.py"
        assert vllm.parameters(file, "Sampler.__call__") == ["logits", "input_batch"]
        assert vllm.parameters(file, "Sampler.sample")[:2] == ["logits", "expanded_idx_mapping"]
        text = vllm.text(file, "Sampler.__call__")
        assert "sampled, processed_logits = self.sample(logits, expanded_idx_mapping," in text
        assert "sampled_token_ids=sampled.view(-1, 1)" in text
        assert "__slots__" not in vllm.text(file, "Sampler")

    def test_new_requests_are_taken_in_before_their_first_step(self, vllm: VllmSource) -> None:
        text = vllm.text(RUNNER, "GPUModelRunner.add_requests")
        added = text.index("self.model_state.add_request(req_index, new_req_data)")
        assert added < text.index("self.model_state.apply_staged_writes()")

    def test_a_place_without_a_draft_is_decided_by_the_verifier(self, vllm: VllmSource) -> None:
        """-1 is no draft: ``NLDRejectionSampler`` marks places so, where draft logits are kept."""
        keeps = "logits_cache" in vllm.parameters("v1/worker/gpu/sample/gumbel.py", "gumbel_sample")
        text = vllm.text(f"{SPECULATORS}/rejection_sampler_utils.py")
        assert not keeps or "if is_bonus or not is_valid_rejected_draft:" in text

    def test_ar_draws_by_the_position_before_the_token(self, vllm: VllmSource) -> None:
        text = vllm.text("v1/worker/gpu/sample/sampler.py", "Sampler.__call__")
        assert "pos = input_batch.positions[input_batch.logits_indices]" in text


class TestScheduling:
    def test_places_for_drafts_are_granted_after_a_step_is_planned(self, vllm: VllmSource) -> None:
        text = vllm.text(SCHEDULER, "AsyncScheduler._update_after_schedule")
        assert "request.spec_token_ids = self._spec_token_placeholders" in text
        assert "if request.is_prefill_chunk:" in text
        assert "request.num_output_placeholders +=" in text

    def test_no_step_skips_drafts(self, vllm: VllmSource) -> None:
        """From 0.33 on vLLM may; a method without slots for its own cache is left alone."""
        text = vllm.text("v1/core/sched/scheduler.py", "Scheduler")
        if "skip_drafts" in text:
            assert "self.can_skip_drafts = self.num_lookahead_tokens > 0 and vllm_config.use_v2_model_runner" in text
            assert "drafts_needed = not self.can_skip_drafts" in text
            assert "custom_class" not in vllm.text(CONFIG, "VllmConfig.num_lookahead_tokens")

    def test_synchronous_drafts_are_taken_in_by_one_method(self, vllm: VllmSource) -> None:
        text = vllm.text("v1/core/sched/scheduler.py", "Scheduler.update_draft_token_ids")
        assert "request.spec_token_ids = " in text

    def test_results_name_their_rows(self, vllm: VllmSource) -> None:
        assert {"req_id_to_index", "sampled_token_ids"} <= vllm.fields("v1/outputs.py", "ModelRunnerOutput")

    @pytest.mark.parametrize("platform", ["gpu_worker.py", "cpu_worker.py"])
    def test_workers_know_which_runner_they_have(self, vllm: VllmSource, platform: str) -> None:
        assert "self.use_v2_model_runner" in vllm.text(f"v1/worker/{platform}")
