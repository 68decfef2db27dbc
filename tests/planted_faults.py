"""The faults that `python -m tests.mutations` plants, and the test that must fail for each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """A planted fault.

    Attributes:
        name: What is wrong.
        file: Where, below ``lightning_ep/``.
        before: Text that is there once.
        after: What takes its place.
        test: The test of the default run that must fail, by its pytest id below ``tests/``.
    """

    name: str
    file: str
    before: str
    after: str
    test: str


_MOE = "moe/test_moe.py::test_output_and_gradients[dtype0-fused-1e-12-2]"
_NORMS = "trainer/test_clipping.py::test_norms_of_every_order_count_copies_once"
_PARITY = "test_parity.py::test_training_equals_one_process[2-2]"

MUTATIONS = (
    # ------------------------------------------------------------------------------------------------ gradients
    Mutation(
        "gradient_of_tokens_scaled",
        "moe/function.py",
        'dispatcher.combine(plan, grad_rows_NH, "dispatch, backward")',
        'dispatcher.combine(plan, grad_rows_NH * 1.001, "dispatch, backward")',
        _MOE,
    ),
    Mutation(
        "gradient_of_routing_weights_scaled",
        "moe/function.py",
        "dispatcher.combine_slots(plan, grad_weights_NK, ",
        "dispatcher.combine_slots(plan, grad_weights_NK * 1.001, ",
        _MOE,
    ),
    Mutation(
        "gradient_of_experts_scaled",
        "ops/fused_experts.py",
        "return grad_up, grad_down, *biases",
        "return grad_up, None if grad_down is None else grad_down * 1.001, *biases",
        _MOE,
    ),
    Mutation(
        "gradient_of_routing_weights_without_that_of_biases",
        "ops/fused_experts.py",
        "grad_weights_NK += self._of_slots(",
        "self._of_slots(",
        "moe/test_families.py::test_fused_experts_equal_those_of_the_family[gpt_oss]",
    ),
    Mutation(
        "mixers_see_padding",
        "context_parallel/mixers.py",
        '{"attention_mask": piece.attention_mask}',
        '{"attention_mask": None}',
        "context_parallel/test_context_parallel.py::test_linear_attention_and_convolutions_run_on_whole_sequences[qwen3_next]",
    ),
    Mutation(
        "adapters_of_experts_scaled",
        "ops/low_rank.py",
        "out_PR[rows] = scale * (",
        "out_PR[rows] = 1.001 * scale * (",
        "adapters/test_gradients.py::test_gradients_equal_pefts[qwen3_moe]",
    ),
    Mutation(
        "adapters_go_on_on_another_base",
        "hub/frozen_base.py",
        'if before["fingerprint"] != now["fingerprint"] or',
        "if",
        "adapters/test_checkpoints.py::test_adapters_resume_on_another_layout_and_on_their_base_only[False]",
    ),
    Mutation(
        "gradient_of_dense_parameters_scaled",
        "fsdp/groups.py",
        "child.set_gradient_divide_factor(1.0)",
        "child.set_gradient_divide_factor(1.001)",
        "moe/test_families.py::test_gradients_equal_one_process[mixtral-2-2]",
    ),
    Mutation(
        "gradients_added_in_bf16",
        "moe/master_weights.py",
        "widen_gradient(param)\n        return dtype if self._narrow and self._calls == 1 and param.grad is None",
        "return dtype if self._narrow",
        "ops/test_adamw.py::test_equals_torch[gradients_that_are_added_are_wide]",
    ),
    Mutation(
        "clipped_to_another_bound",
        "trainer/clipping.py",
        "return (max_norm / (norm + 1e-6)).clamp(max=1.0)",
        "return (1.001 * max_norm / (norm + 1e-6)).clamp(max=1.0)",
        _PARITY,
    ),
    Mutation(
        "copies_counted_in_the_norm",
        "trainer/clipping.py",
        "total += sum_of_squares(grads) / replicas",
        "total += sum_of_squares(grads)",
        _NORMS,
    ),
    Mutation(
        "copies_counted_in_norms_of_other_orders",
        "trainer/clipping.py",
        "total += norms.pow(norm_type).sum() / replicas",
        "total += norms.pow(norm_type).sum()",
        _NORMS,
    ),
    # ------------------------------------------------------------------------------------------------ steps
    Mutation(
        "lost_micro_batch",
        "fsdp/passes.py",
        "    if fsdp.is_outermost(state):\n        end_pass(state)",
        "    if fsdp.is_outermost(state):\n        fsdp.forget_gradients(state)\n        end_pass(state)",
        _PARITY,
    ),
    Mutation(
        "tokens_counted_per_rank",
        "causal_lm.py",
        "        sums = self._summed_over_ranks(sums)\n        # A window",
        "        sums = sums * dist.get_world_size()\n        # A window",
        _PARITY,
    ),
    Mutation(
        "stale_weights_after_a_pass_that_broke_off",
        "fsdp/state.py",
        "            group._training_state = idle\n            group.reshard()",
        "            group._training_state = idle",
        "fsdp/test_interrupted.py::test_the_next_step[2-True-False]",
    ),
    Mutation(
        "parameters_stay_gathered_after_a_forward_alone",
        "fsdp/groups.py",
        "shard(model, reshard_after_forward=True)",
        "shard(model, reshard_after_forward=False)",
        "trainer/test_runs.py::test_works_or_is_refused[parameters_are_shards_in_every_hook]",
    ),
    Mutation(
        "step_left_out_by_each_rank_for_itself",
        "trainer/nonfinite.py",
        "if bool(torch.isfinite(norm)):",
        "if all(bool(p.grad.to_local().isfinite().all()) for p in params if p.grad is not None):",
        "trainer/test_steering.py::test_works_or_is_refused[a_step_without_a_finite_norm_is_left_out]",
    ),
    Mutation(
        "weight_decay_scaled",
        "ops/adamw.py",
        "weight_decay=rule.weight_decay,",
        "weight_decay=1.001 * rule.weight_decay,",
        "ops/test_adamw.py::test_goes_on_from_the_other_state[True-plain]",
    ),
    Mutation(
        "rounding_numbers_elements_of_the_shard",
        "trainer/random_bits.py",
        "start += sum(first * stride for",
        "start += sum(0 * first * stride for",
        "trainer/test_rounding.py::test_parts_are_those_of_the_whole_however_it_is_cut",
    ),
    Mutation(
        "second_moments_rounded_to_the_nearest",
        "ops/adamw.py",
        "if target.dtype == torch.bfloat16:",
        "if target.dtype == torch.bfloat16 and target is not exp_avg_sq:",
        "ops/test_rounding.py::test_second_moments_in_bf16_decay_only_if_rounded_stochastically",
    ),
    # ------------------------------------------------------------------------------------------------ ranks
    Mutation(
        "tokens_sent_to_the_next_rank",
        "moe/dispatch/all_to_all.py",
        "to = destinations(ids_TK, weights_TK,",
        "to = destinations((ids_TK + self.num_local_experts) % self.num_experts, weights_TK,",
        _MOE,
    ),
    Mutation(
        "pairs_counted_as_sent",
        "moe/dispatch/all_to_all.py",
        "num_pairs = sum(pairs & COUNT for _, pairs in received)",
        "num_pairs = sum(pairs & COUNT for _, pairs in sent)",
        _MOE,
    ),
    Mutation(
        "buffers_of_each_rank",
        "parallelize.py",
        "(*self.module.parameters(), *self.module.buffers())",
        "self.module.parameters()",
        "test_parallelize.py::test_buffers_in_memory_are_those_of_rank_0_everywhere",
    ),
    Mutation(
        "swapped_data_ranks",
        "layout.py",
        "return global_rank // (self.tp * self.cp)",
        "return global_rank % self.data_world_size",
        "test_layouts.py::test_both_views_of_the_ranks",
    ),
    Mutation(
        "a_problem_of_one_rank_is_its_own",
        "distributed/agreement.py",
        "    if problems:\n        raise error(problems)",
        "    if problem is not None:\n        raise error(problems)",
        "distributed/test_agreement.py::test_all_return_or_all_raise[False]",
    ),
    Mutation(
        "tensor_parallel_gradient_not_summed",
        "tensor_parallel/collectives.py",
        "        return _all_reduce(grad, ctx.name), None\n\n\ndef all_reduce(",
        "        return grad, None\n\n\ndef all_reduce(",
        "tensor_parallel/test_tensor_parallel.py::test_the_loss_without_logits[21-5-dtype0-1e-12]",
    ),
    Mutation(
        "positions_begin_anew_in_every_piece",
        "context_parallel/sequence.py",
        'pieces["position_ids"] = torch.arange(start, start + length, device=tokens.device)[None]',
        'pieces["position_ids"] = torch.arange(length, device=tokens.device)[None]',
        "context_parallel/test_context_parallel.py::test_pieces_are_consecutive_and_their_targets_cross_the_borders",
    ),
    Mutation(
        "packed_documents_that_a_mask_hides",
        "transformers_adapter/packing.py",
        "begins = steps != 1 if counts is None else (steps <= 0) & counts[:, 1:] & counts[:, :-1]",
        "begins = steps != 1 if counts is None else (steps != steps)",
        "transformers_adapter/test_packed_documents.py::test_positions_say_what_padding_does_not",
    ),
    Mutation(
        "padding_in_front_that_tokens_see",
        "transformers_adapter/packing.py",
        "gaps = counts is not None and bool((counts[:, 1:] & ~counts[:, :-1]).any())",
        "gaps = False",
        "transformers_adapter/test_padding.py::test_padding_elsewhere_keeps_its_mask[qwen3_moe]",
    ),
    Mutation(
        "documents_that_see_those_before",
        "ops/packed_attention.py",
        "document_BS[:, :, None] == document_BS[:, None, :]",
        "document_BS[:, :, None] >= document_BS[:, None, :]",
        "transformers_adapter/test_document_bounds.py::test_the_mask_of_bounds_is_that_of_transformers[None]",
    ),
    Mutation(
        "a_window_one_token_too_wide",
        "ops/packed_attention.py",
        "(-1 if window is None else window - 1, 0)",
        "(-1 if window is None else window, 0)",
        "transformers_adapter/test_document_bounds.py::test_packed_documents_are_separate_ones_on_every_path[True]",
    ),
    Mutation(
        "layers_compiled_for_every_length_of_documents",
        "transformers_adapter/document_bounds.py",
        "torch._dynamo.maybe_mark_dynamic(mask, [2, 3])",
        "torch._dynamo.maybe_mark_dynamic(mask, [3])",
        "transformers_adapter/test_document_bounds.py::test_layers_are_compiled_once_for_any_number_of_documents"
        "[none-aot_eager]",
    ),
    # ------------------------------------------------------------------------------------------------ layers
    Mutation(
        "routed_twice_under_recompute",
        "layers/recompute.py",
        "for module in (*routers, *experts):",
        "for module in experts:",
        "layers/test_recompute.py::test_gradients_are_equal_and_nothing_runs_twice_that_need_not[1-1]",
    ),
    Mutation(
        "rows_summed_in_bf16",
        "ops/permute.py",
        "accumulate = torch.promote_types(rows_NH.dtype, torch.float32)",
        "accumulate = rows_NH.dtype",
        "ops/test_twins.py::test_rows_in_bf16_are_summed_in_fp32",
    ),
    Mutation(
        "gradient_of_the_head_added_in_bf16",
        "ops/cross_entropy.py",
        "torch.empty_like(weight_VH, dtype=accumulate) if of_weight",
        "torch.empty_like(weight_VH) if of_weight",
        "ops/test_cross_entropy.py::test_a_head_in_bf16_is_rounded_where_it_is_stored_only",
    ),
    Mutation(
        "rotary_frequencies_in_bf16",
        "transformers_adapter/dtypes.py",
        "            name in narrow\n            and buffer.dtype",
        "            buffer.dtype",
        "test_models.py::test_works_or_is_refused[dtypes_of_every_precision]",
    ),
    Mutation(
        "routing_weights_rounded_by_fsdp",
        "fsdp/groups.py",
        "replace(mp_policy, cast_forward_inputs=False)",
        "replace(mp_policy, cast_forward_inputs=True)",
        "moe/test_families.py::test_routing_weights_in_fp32_stay_so_on_every_layout[1]",
    ),
    # ------------------------------------------------------------------------------------------------ data and metrics
    Mutation(
        "validation_weighted_by_batches",
        "causal_lm.py",
        "        _, sums_2 = self.loss_sums(batch)\n",
        "        _, sums_2 = self.loss_sums(batch)\n"
        "        sums_2[0] /= sums_2[1].clamp(min=1)\n        sums_2[1] = 1\n",
        "trainer/test_runs.py::test_works_or_is_refused[evaluation_in_which_some_ranks_and_batches_have_no_target]",
    ),
    Mutation(
        "balancing_loss_not_counted_by_tokens",
        "routing/steer.py",
        "return total * weight_of_all",
        "return total",
        "routing/test_losses.py::test_a_step_follows_the_losses_of_the_global_micro_batches[2-layout1-cases1]",
    ),
    Mutation(
        "predictions_given_twice",
        "trainer/uneven_inputs.py",
        "                self._join(self, last, step)",
        "                yield last",
        "trainer/test_loaders.py::test_predict_returns_each_sample_once[4]",
    ),
    Mutation(
        "resumed_loader_gives_a_batch_again",
        "data/resumable_loader.py",
        "            self._samples = self.batch_sampler.next_position(self._samples)\n            yield batch",
        "            yield batch\n            self._samples = self.batch_sampler.next_position(self._samples)",
        "data/test_text.py::test_resumes_on_another_number_of_data_ranks",
    ),
    # ------------------------------------------------------------------------------------------------ files
    Mutation(
        "checksum_not_looked_at",
        "checkpoint/files.py",
        "if found.crc32 != expected.crc32:",
        "if found.bytes != expected.bytes:",
        "checkpoint/test_files.py::test_damage_is_named_on_every_rank",
    ),
    Mutation(
        "random_state_not_put_back",
        "checkpoint/metadata.py",
        'torch.set_rng_state(state["torch"])',
        "torch.get_rng_state()",
        "checkpoint/test_files.py::test_generators_of_random_numbers_come_back",
    ),
    Mutation(
        "moments_not_read",
        "checkpoint/resume.py",
        "        self._alone(allocate)\n        read_shards(state, self._reader, self._ranks.group)",
        "        self._alone(allocate)\n        for tensors in state.values():\n"
        '            for moments in tensors["state"].values():\n'
        '                [value.zero_() for key, value in moments.items() if key != "step"]',
        "checkpoint/test_resume.py::test_losses_after_a_resume[2-{}]",
    ),
    Mutation(
        "experts_read_from_the_other_end",
        "distributed/shards.py",
        "offset = min(index * chunk, size[dim])",
        "offset = min((num_chunks - 1 - index) * chunk, size[dim])",
        "hub/test_load.py::test_weights_take_the_parameters_dtype",
    ),
    Mutation(
        "two_experts_begin_alike",
        "hub/initialize.py",
        'f"{stream}[{e}]")) for e in experts]',
        'f"{stream}[{e - region.start[0]}]")) for e in experts]',
        "hub/test_initialize.py::test_one_seed_gives_one_model_on_every_layout",
    ),
    # ------------------------------------------------------------------------------------------------ after training
    Mutation(
        "windows_of_others_count_twice",
        "cli/perplexity.py",
        "targets_BS = torch.full_like(targets_BS, IGNORE)",
        "targets_BS = targets_BS.clone()",
        "cli/test_perplexity.py::test_documents_are_weighted_by_token_on_any_ranks[ep=2]",
    ),
    Mutation(
        "predictions_by_rank",
        "callbacks/predictions.py",
        "key=lambda item: item[0]",
        "key=lambda item: 0",
        "cli/test_predictions.py::test_each_sample_is_written_once_and_in_order[ep=2]",
    ),
    Mutation(
        "chat_forgets_its_answers",
        "cli/generation.py",
        'self._messages.append({"role": "assistant", ',
        'str({"role": "assistant", ',
        "cli/test_generation.py::test_a_chat_goes_through_the_template_and_keeps_what_was_said",
    ),
    # --------------------------------------------------------------------------------------------------- what is learnt
    Mutation(
        "think_block_of_the_prompt_learnt",
        "data/chat_template.py",
        "return len(prompt), end",
        'return len(prompt.removesuffix("<think>\\n\\n</think>\\n\\n")), end',
        "data/test_chat_template.py::test_learnt_is[qwen3 without thinking]",
    ),
    Mutation(
        "end_of_turn_not_learnt",
        "data/chat_template.py",
        "found, end = end, end - len(stop)",
        "found = end = end - len(stop)",
        "data/test_chat_template.py::test_learnt_is[llama3]",
    ),
    Mutation(
        "turns_learnt_that_were_never_generated",
        "data/chat_template.py",
        "        if not text.startswith(until[:end]):\n            return None\n",
        "",
        "data/test_chat_template.py::test_learnt_is[gpt-oss]",
    ),
    Mutation(
        "tokens_learnt_that_begin_in_the_prompt",
        "data/rendering.py",
        "within |= (begins >= first)",
        "within |= (ends > first)",
        "data/test_chat.py::test_tokens_are_learnt_that_lie_in_a_span",
    ),
    Mutation(
        "second_bos",
        "data/rendering.py",
        "self.tokenizer(texts, add_special_tokens=False,",
        "self.tokenizer(texts, add_special_tokens=True,",
        "data/test_chat_template.py::test_tokens_are_those_of_apply_chat_template[llama3]",
    ),
    Mutation(
        "messages_learnt_that_are_not_to_be",
        "data/conversations.py",
        'for key in ("train", "weight")',
        'for key in ("weight",)',
        "data/test_conversations.py::test_a_message_says_whether_it_is_learnt",
    ),
    Mutation(
        "keys_of_other_rows",
        "data/row_files.py",
        "for key, item in value.items() if item is not None}",
        "for key, item in value.items()}",
        "data/test_row_files.py::test_a_row_means_the_same_whatever_holds_it_and_whichever_rows_are_beside_it[parquet]",
    ),
    Mutation(
        "validation_windows_left_out",
        "data/collate.py",
        "self._size = -(-len(windows) // multiple) * multiple",
        "self._size = len(windows)",
        "data/test_validation_sources.py::test_each_source_has_its_loss_over_all_of_its_tokens[2-1-2]",
    ),
    Mutation(
        "losses_of_sources_mixed",
        "trainer/evaluation.py",
        "sums_N2[index] = sums_2",
        "sums_N2[-1 - index] = sums_2",
        "data/test_validation_sources.py::test_each_source_has_its_loss_over_all_of_its_tokens[1-2-1]",
    ),
    Mutation(
        "stream_resumed_at_the_buffer",
        "data/packed_stream.py",
        "for number in order[position.windows :].tolist():",
        "for number in order.tolist():",
        "data/test_text_stream.py::test_a_run_goes_on_at_any_batch[jsonl-1]",
    ),
    Mutation(
        "stream_not_shared",
        "data/text_stream.py",
        "split_dataset_by_node(open_stream(self.stream_source, self.column), rank, world)",
        "split_dataset_by_node(open_stream(self.stream_source, self.column), 0, world)",
        "data/test_text_stream.py::test_ranks_read_shares_take_equal_steps_and_resume[3]",
    ),
    Mutation(
        "predicted_rows_renumbered",
        "data/predicted_documents.py",
        "row = counts.rows(name)",
        "row = counts.rows(name) // 2",
        "data/test_predicted_rows.py::test_each_row_is_written_once_with_its_likelihood[alone]",
    ),
    # ------------------------------------------------------------------------------------------------ what ranks share
    Mutation(
        "tokens_of_another_ranks_rows",
        "fsdp/embedding.py",
        "ids_T = ids_T - first",
        "ids_T = ids_T - max(0, first - 1)",
        "fsdp/test_embedding.py::test_gradients_add_up[layout1-101-overrides1-1]",
    ),
    Mutation(
        "idle_parameters_keep_zeros",
        "fsdp/idle_parameters.py",
        "fsdp.shard_of(param).grad = None",
        "fsdp.shard_of(param).grad.zero_()",
        "fsdp/test_idle_parameters.py::test_branches_in_turns[2-1-False]",
    ),
    Mutation(
        "buffers_written_twice",
        "layers/buffers.py",
        "module._buffers[name] = buffer",
        "module._buffers[name] = module._buffers[name]",
        "layers/test_buffers.py::test_a_layer_writes_into_its_buffers_once[False-batch]",
    ),
    Mutation(
        "link_left_without_a_checkpoint",
        "checkpoint/files.py",
        "_lead(links, replaced)  # while",
        "_lead([], replaced)  # while",
        "checkpoint/test_files.py::test_a_link_leads_to_a_checkpoint_at_every_moment[.ckpt]",
    ),
    Mutation(
        "pairs_that_are_none_count",
        "dpo.py",
        "(margin > 0).float(), is_pair)",
        "(margin > 0).float(), torch.ones_like(is_pair))",
        "test_dpo.py::test_an_adapter_learns_to_prefer_and_comes_out",
    ),
)
