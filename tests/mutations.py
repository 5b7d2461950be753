"""Single wrong lines that the tests must notice, for ``python -m tests.mutate``. To add one, append it."""

from __future__ import annotations

from typing import NamedTuple


class Mutation(NamedTuple):
    """In ``file``, ``old``, which stands there exactly once, becomes ``new``, and one of ``tests`` fails.

    ``tests``: arguments of pytest; the fewer tests, the sooner it is known.
    """

    file: str
    old: str
    new: str
    tests: str

    def __str__(self) -> str:
        return f"{self.file}: {' '.join(self.old.split())} -> {' '.join(self.new.split())}"


AUTOGRAD = "tests/test_autograd.py"

MUTATIONS = [
    Mutation(
        "resnet_fused/chain.py",
        "return not self.frozen or self.needs.gamma",
        "return not self.frozen",
        f"{AUTOGRAD} -k frozen",
    ),
    Mutation(
        "resnet_fused/chain.py",
        "bias = unit.stats[2] * dbeta if unit.frozen else",
        "bias = 0 * dbeta if unit.frozen else",
        f"{AUTOGRAD} -k frozen",
    ),
    Mutation(
        "resnet_fused/chain.py",
        "return g.clone() if g is dz else g.to(shortcut.dtype)",
        "return g.to(shortcut.dtype)",
        f"{AUTOGRAD} -k opcheck",
    ),
    Mutation("resnet_fused/chain.py", "total = own.clone()", "total = own", "tests/test_distributed.py -k one_process"),
    Mutation("resnet_fused/chain.py", "mask=True, out=dx", "mask=False, out=dx", f"{AUTOGRAD} -k fp32"),
    Mutation(
        "resnet_fused/chain.py",
        "overwrite=g is not dz and not keeps_g",
        "overwrite=not keeps_g",
        f"{AUTOGRAD} -k 'fp32 and run'",
    ),
    Mutation(
        "resnet_fused/chain.py",
        "overwrite=g is not dz and not keeps_g",
        "overwrite=g is not dz",
        f"{AUTOGRAD} -k fp32",
    ),
    Mutation(
        "resnet_fused/autograd.py",
        "keep = [True] * (branch - 1) + [spec.keep_last_y, spec.keep_projection_y]",
        "keep = [True] * (branch + 1)",
        "tests/test_training_costs.py -k saved_bytes",
    ),
    Mutation("resnet_fused/autograd.py", "if torch.is_grad_enabled():", "if False:", f"{AUTOGRAD} -k second"),
    Mutation(
        "resnet_fused/functional.py",
        'if conv.padding == "valid":',
        "if False:",
        "tests/test_functional.py -k convolution_arguments",
    ),
    Mutation(
        "resnet_fused/functional.py",
        'return "the batch is empty"',
        "pass",
        "tests/test_functional.py -k empty",
    ),
    Mutation(
        "resnet_fused/modules.py",
        "(self.out_channels - self.in_channels) // 2",
        "0",
        "tests/test_modules.py -k splits",
    ),
    Mutation(
        "resnet_fused/modules.py",
        'recompute=self.memory == "recompute"',
        "recompute=False",
        "tests/test_training_costs.py -k saved_bytes",
    ),
    Mutation(
        "resnet_fused/plan.py",
        'entry.tiles if entry is not None and entry.implementation == "fused" else Tiles()',
        "entry.tiles if entry is not None else Tiles()",
        "tests/test_plan.py -k force",
    ),
    Mutation(
        "resnet_fused/plan.py",
        "key=lambda way: (waited(problem, *way), way[1])",
        "key=lambda way: way[1]",
        "tests/test_plan.py -k host",
    ),
    Mutation("resnet_fused/plan.py", "_requested.reset(token)", "pass", "tests/test_functional.py -k restored"),
    Mutation(
        "resnet_fused/tuned.py",
        'os.environ.get("XDG_CACHE_HOME") or Path.home()',
        "Path.home()",
        "tests/test_tuned.py::test_the_cache_directory",
    ),
    Mutation(
        "resnet_fused/tuned.py",
        "except RuntimeError:\n        message",
        "except KeyError:\n        message",
        "tests/test_tuned.py::test_without_a_home_directory_everything_runs_and_nothing_is_kept",
    ),
    Mutation(
        "resnet_fused/tuned.py",
        "for find in (path, _shipped):",
        "for find in (_shipped, path):",
        "tests/test_tuned.py::test_the_package_ships_tables_that_the_users_own_comes_before",
    ),
    Mutation(
        "resnet_fused/tuned.py",
        "@cache\ndef _warn_once",
        "def _warn_once",
        "tests/test_tuned.py::test_a_bad_table_is_refused_with_one_message_and_ignored",
    ),
    Mutation(
        "resnet_fused/tuned.py",
        "        load.cache_clear()\n        table = (load",
        "        table = (load",
        "tests/test_tuned.py::test_what_another_process_saved_since_the_table_was_loaded_stays",
    ),
    Mutation(
        "resnet_fused/tuned.py",
        "fcntl.flock(lock, fcntl.LOCK_EX)",
        "fcntl.flock(lock, fcntl.LOCK_SH)",
        "tests/test_tuned.py::test_tuners_side_by_side_lose_no_entry",
    ),
    Mutation(
        "resnet_fused/tuned.py",
        "        temporary.unlink(missing_ok=True)\n",
        "",
        "tests/test_tune.py::test_a_full_disk_leaves_the_old_table",
    ),
    Mutation(
        "resnet_fused/tuned.py",
        "if problem.gpu != gpu:",
        "if False:",
        "tests/test_tuned.py::test_a_bad_table_is_refused_with_one_message_and_ignored",
    ),
    Mutation(
        "resnet_fused/tuned.py",
        "if tiles.encode() != code:",
        "if False:",
        "tests/test_tuned.py::test_a_bad_table_is_refused_with_one_message_and_ignored",
    ),
    Mutation(
        "resnet_fused/tuned.py",
        "1 <= tiles.wgrad.splits <= 2 * gpu",
        "0 <= tiles.wgrad.splits <= 2 * gpu",
        "tests/test_tuned.py::test_a_bad_table_is_refused_with_one_message_and_ignored",
    ),
    Mutation(
        "resnet_fused/tuned.py",
        "<= 2 * gpu.multiprocessors:",
        "<= gpu.multiprocessors:",
        "tests/test_tuned.py::test_limits_are_legal",
    ),
    Mutation(
        "resnet_fused/tuned.py",
        "all(1 <= number < 2**31",
        "all(0 <= number < 2**31",
        "tests/test_tuned.py::test_a_bad_table_is_refused_with_one_message_and_ignored",
    ),
    Mutation(
        "resnet_fused/tuned.py",
        "or min(problem.p, problem.q) < 1",
        "or problem.m < 1",
        "tests/test_tuned.py::test_a_bad_table_is_refused_with_one_message_and_ignored",
    ),
    Mutation(
        "resnet_fused/tuned.py",
        "1 <= tile.num_stages <= 8",
        "0 <= tile.num_stages <= 8",
        "tests/test_tuned.py::test_a_bad_table_is_refused_with_one_message_and_ignored",
    ),
    Mutation(
        "resnet_fused/tuned.py",
        "(tile.block_m + tile.block_n) * tile.block_k",
        "tile.block_m * tile.block_k",
        "tests/test_tuned.py::test_a_bad_table_is_refused_with_one_message_and_ignored",
    ),
    Mutation(
        "resnet_fused/tuned.py",
        "conv_forward(x, w, config=tiles.forward",
        "conv_forward(x, w, config=None",
        "tests/test_tuned.py::test_a_bad_table_is_refused_with_one_message_and_ignored",
    ),
    Mutation(
        "resnet_fused/tuned.py",
        "with _disable_current_modes(), dry_run(p.arch, p.gpu):",
        "with dry_run(p.arch, p.gpu):",
        "tests/test_tuned.py::test_nobody_sees_the_rehearsal",
    ),
    Mutation(
        "resnet_fused/tune.py",
        "report.table.exact(problem)",
        "report.table.lookup(problem)",
        "tests/test_tune.py::test_what_is_known_is_not_measured_again",
    ),
    Mutation(
        "resnet_fused/tune.py",
        "        tuned.require_writable(gpu)\n",
        "",
        "tests/test_tune.py::test_a_table_that_cannot_be_written_is_found_before_anything_is_measured",
    ),
    Mutation(
        "resnet_fused/tune.py",
        "return one.median + max(one.spread, other.spread) < other.median",
        "return one.median < other.median",
        "tests/test_tune.py::test_the_fastest_wins_if_it_wins_by_more_than_the_spread",
    ),
    Mutation(
        "resnet_fused/tune.py",
        "if not ratio <= 1:",
        "if ratio > 1:",
        "tests/test_tune.py::test_a_bad_candidate_is_quarantined_and_the_others_go_on",
    ),
    Mutation(
        "resnet_fused/tune.py",
        "self.timings.pop(bad, None)",
        "pass",
        "tests/test_tune.py::test_a_candidate_that_fails_the_second_time_is_out",
    ),
    Mutation(
        "resnet_fused/tune.py",
        "bad = failure.candidate or right[0]",
        "bad = right[0]",
        "tests/test_tune.py::test_a_bad_candidate_is_quarantined_and_the_others_go_on",
    ),
    Mutation(
        "resnet_fused/tune.py",
        'if Candidate("fused", best) not in trial.timings:',
        "if False:",
        "tests/test_tune.py::test_the_best_tiles_of_each_kernel_are_tried_together",
    ),
    Mutation(
        "resnet_fused/tune.py",
        "work(self.runners[0], islice(others, 1))",
        "pass",
        "tests/test_tune.py::test_nothing_is_compiled_side_by_side_with_itself",
    ),
    Mutation(
        "resnet_fused/tune_worker.py",
        "i = (turn + step) % len(works)",
        "i = step",
        "tests/test_tune.py::test_the_worker_verifies_and_times",
    ),
    Mutation(
        "resnet_fused/tune_worker.py",
        "if needed > shared:",
        "if needed < shared:",
        "tests/test_tune.py::test_candidates_that_do_not_compile_are_told_apart",
    ),
    Mutation(
        "resnet_fused/verify.py",
        "cudnn.deterministic, cudnn.benchmark = True, False",
        "cudnn.deterministic, cudnn.benchmark = True, cudnn.benchmark",
        "tests/test_tune.py::test_what_is_right_does_not_depend_on_the_fastest_algorithm",
    ),
    Mutation(
        "resnet_fused/verify.py",
        "with _Tf32Factors() if tf32 else nullcontext():",
        "with nullcontext():",
        "tests/test_tune.py::test_tf32_is_judged_by_what_it_may_cost",
    ),
    Mutation(
        "resnet_fused/verify.py",
        "~0x1FFF",
        "~0x3FFF",
        "tests/test_check.py::test_eager_in_tf32_is_convolution_of_cut_factors",
    ),
    Mutation(
        "resnet_fused/verify.py",
        "2 * _error(eager, exact) + tiny",
        "3 * _error(eager, exact) + tiny",
        "tests/test_check.py::test_error_ratio_is_the_error_over_what_is_allowed",
    ),
    Mutation(
        "resnet_fused/verify.py",
        "except (OSError, ValueError, RecursionError):",
        "except (OSError, ValueError):",
        "tests/test_tuned.py::test_a_note_that_is_none_costs_another_self_test",
    ),
    Mutation(
        "resnet_fused/trial.py",
        "if (t, splits) != (wgrad.tile, wgrad.splits)",
        "if True",
        "tests/test_tune.py::test_candidates_are_legal_and_distinct",
    ),
    Mutation(
        "resnet_fused/trial.py",
        "dx = torch.where(a > 0, dx, 0.0)",
        "pass",
        "tests/test_tune.py::test_verification_passes_what_is_right",
    ),
    Mutation(
        "resnet_fused/commands.py",
        "path = [*filter(None, sys.path), str",
        "path = [*sys.path, str",
        "tests/test_commands.py::test_a_module_is_run_with_its_arguments",
    ),
    Mutation(
        "resnet_fused/commands.py",
        "if not least <= number <= most:",
        "if not least <= number:",
        "tests/test_commands.py::test_a_mistake_is_one_line_and_exit_code_2",
    ),
    Mutation(
        "resnet_fused/commands.py",
        "whole(32, MAX_PIXELS)",
        "whole(1, MAX_PIXELS)",
        "tests/test_commands.py::test_a_mistake_is_one_line_and_exit_code_2",
    ),
    Mutation(
        "resnet_fused/commands.py",
        "if os.path.lexists(path))",
        "if os.path.exists(path))",
        "tests/test_commands.py::test_a_folder_that_cannot_be_written_is_told",
    ),
    Mutation(
        "resnet_fused/__main__.py",
        '" ".join(message.splitlines())',
        "message",
        "tests/test_commands.py::test_a_mistake_is_one_line_and_exit_code_2",
    ),
    Mutation(
        "resnet_fused/cost.py",
        '    os.chdir("/")\n',
        "",
        "tests/test_commands.py::test_the_compilers_of_cost_import_nothing_from_the_current_directory",
    ),
    Mutation(
        "resnet_fused/inference.py",
        'capture_error_mode="thread_local"',
        'capture_error_mode="global"',
        "tests/test_inference.py -k a_graph_is_replayed",
    ),
    Mutation(
        "resnet_fused/inference.py", "        or not bn.eps > 0\n", "", "tests/test_inference.py -k 'eps and surgery'"
    ),
    Mutation(
        "resnet_fused/inference.py",
        "    return _is_dense(t) and t.shape == weight.shape[:1] and",
        "    return _is_dense(t) and",
        "tests/test_inference.py -k 'bias and surgery'",
    ),
    Mutation(
        "resnet_fused/inference.py",
        "return (shape[0], weight.shape[0], p, q) if p > 0 and q > 0 else None",
        "return shape[0], weight.shape[0], p, q",
        "tests/test_inference.py -k 'kernels_refuse'",
    ),
    Mutation(
        "resnet_fused/inference.py",
        "if len(shape) != 4 or shape[1] != weight.shape[1] * groups:",
        "if len(shape) != 4:",
        "tests/test_inference.py -k kernels_refuse",
    ),
    Mutation(
        "resnet_fused/inference.py",
        "y = y.add_(residual) if accumulates else y + residual",
        "y = y + residual",
        "tests/test_inference.py -k residual_of_another_kind",
    ),
    Mutation(
        "resnet_fused/inference.py",
        'raise RuntimeError("its forward draws random numbers")',
        "pass",
        "tests/test_inference.py -k effects",
    ),
    Mutation(
        "resnet_fused/inference.py",
        'raise RuntimeError("its forward writes to the module")',
        "pass",
        "tests/test_inference.py -k effects",
    ),
    Mutation(
        "resnet_fused/inference.py",
        'raise RuntimeError("its forward writes to a buffer")',
        "pass",
        "tests/test_inference.py -k effects",
    ),
    Mutation(
        "resnet_fused/inference.py",
        "        or torch._C._get_tracing_state() is not None\n",
        "",
        "tests/test_inference.py -k tracers",
    ),
    Mutation(
        "resnet_fused/inference.py",
        "kept = list(self._packed.items())[1 - PACKED_SHAPES :]",
        "kept = list(self._packed.items())",
        "tests/test_inference.py -k sizes_may_change",
    ),
    Mutation(
        "resnet_fused/inference.py", "(dtype is not None and layer)):", "False):", "tests/test_inference.py -k dtype"
    ),
    Mutation(
        "resnet_fused/inference.py",
        "functional.channels_last(x.resolve_neg())",
        "functional.channels_last(x)",
        "tests/test_inference.py -k negative_bit",
    ),
    Mutation(
        "resnet_fused/inference.py",
        "keeps = residual is None or self.accumulates",
        "keeps = residual is None",
        "tests/test_inference.py -k residual_of_another_kind",
    ),
    Mutation(
        "resnet_fused/inference.py",
        "return not (functional.hooked() or torch.cuda.is_current_stream_capturing())",
        "return not torch.cuda.is_current_stream_capturing()",
        "tests/test_inference.py -k a_graph_is_replayed",
    ),
    Mutation(
        "resnet_fused/functional.py",
        "batch_stats = bn.training or mean is None",
        "batch_stats = bn.training",
        "tests/test_outcome.py -k 'basic and statistics'",
    ),
    Mutation(
        "resnet_fused/functional.py",
        "if not (bn.training and bn.track_running_stats):",
        "if not bn.training:",
        "tests/test_outcome.py -k 'basic and statistics'",
    ),
    Mutation(
        "resnet_fused/functional.py",
        "vectors[3:] = mean, var = None, None",
        "pass",
        "tests/test_outcome.py -k 'basic and statistics'",
    ),
    Mutation(
        "resnet_fused/functional.py",
        "momentum = None if bn.momentum is None else",
        "momentum = 0.1 if bn.momentum is None else",
        "tests/test_outcome.py -k 'basic and cumulative'",
    ),
    Mutation(
        "kernels/batch_norm.py",
        "eps, 0.0 if momentum is None else momentum, cumulative",
        "eps, 0.1 if momentum is None else momentum, cumulative",
        "tests/test_outcome.py -k 'basic and cumulative'",
    ),
    Mutation(
        "resnet_fused/functional.py",
        'and (kind == "projection" or x.dtype == chain.dtype)',
        "",
        f"{AUTOGRAD} -k not_rounded",
    ),
    Mutation(
        "resnet_fused/functional.py",
        "(unit.w, unit.bias, unit.gamma, unit.beta))]",
        "(unit.w, unit.gamma, unit.beta))]",
        f"{AUTOGRAD} -k alone",
    ),
    Mutation(
        "resnet_fused/functional.py", "used = [chain.x, chain.source, *", "used = [chain.x, *", f"{AUTOGRAD} -k alone"
    ),
    Mutation("resnet_fused/functional.py", "if p < 1 or q < 1:", "if p < 1:", "tests/test_outcome.py -k padded_image"),
    Mutation(
        "resnet_fused/functional.py",
        "if v.numel() != co or",
        "if v.numel() < co or",
        "tests/test_outcome.py -k 'sequence and longer'",
    ),
    Mutation(
        "resnet_fused/functional.py",
        "elif v.dtype != kind:",
        "elif False:",
        "tests/test_outcome.py -k 'basic and alone and fp64'",
    ),
    Mutation(
        "resnet_fused/functional.py",
        "(not compiling and v.is_neg())",
        "False",
        "tests/test_outcome.py -k 'basic and nothing and negative'",
    ),
    Mutation(
        "resnet_fused/functional.py", "if n * p * q == 1 and", "if n == 1 and", "tests/test_functional.py -k two_values"
    ),
    Mutation(
        "resnet_fused/functional.py",
        "fits = x.dtype == w.dtype == dtype or",
        "fits = x.dtype == w.dtype or",
        "tests/test_functional.py -k another_dtype",
    ),
    Mutation(
        "resnet_fused/functional.py",
        "or (_autocasts(x) and x.dtype in",
        "or (x.dtype in",
        "tests/test_functional.py -k another_dtype",
    ),
    Mutation(
        "resnet_fused/functional.py",
        "fits = x.dtype == w.dtype == dtype or (_autocasts(x) and",
        "fits = x.dtype == w.dtype == dtype or (False and",
        "tests/test_functional.py -k fuses_every_unit",
    ),
    Mutation(
        "resnet_fused/functional.py",
        "8 * pixels * projection.w.numel() <= arithmetic",
        "False",
        "tests/test_training_costs.py -k 'saved_bytes and triton'",
    ),
    Mutation(
        "resnet_fused/functional.py",
        "(n, -(-h // step), -(-w // step))",
        "(n, h // step, w // step)",
        "tests/test_functional.py -k 'padded or leaves'",
    ),
    Mutation(
        "resnet_fused/functional.py",
        "return Unit(layer, _plain(w), bias",
        "return Unit(layer, w, bias",
        "tests/test_outcome.py -k 'basic and nothing and negative'",
    ),
    Mutation(
        "resnet_fused/functional.py",
        "x = _plain(channels_last(x))",
        "x = channels_last(x)",
        "tests/test_outcome.py -k 'basic and nothing and negative'",
    ),
    Mutation(
        "resnet_fused/plan.py",
        "found.checkpointed.get(frame, found.last)",
        "found.last",
        "tests/test_untouched.py -k several_roads",
    ),
    Mutation(
        "resnet_fused/plan.py",
        "elif request is _DEFAULT and not found.checkpointed:",
        "elif request is _DEFAULT:",
        "tests/test_untouched.py -k in_between",
    ),
    Mutation(
        "resnet_fused/plan.py",
        "elif request.backward != backward:",
        "else:",
        "tests/test_untouched.py -k road_of_its_own",
    ),
    Mutation(
        "resnet_fused/plan.py",
        "held = held() if isinstance(held, weakref.ref) else held",
        "pass",
        "tests/test_untouched.py -k several_roads",
    ),
    Mutation(
        "resnet_fused/plan.py",
        "(request is _DEFAULT and not _forwards)",
        "request is _DEFAULT",
        "tests/test_untouched.py -k in_between",
    ),
    Mutation(
        "resnet_fused/convert.py",
        "_revert(part)\n        state",
        "pass\n        state",
        "tests/test_convert.py -k later",
    ),
    Mutation(
        "resnet_fused/convert.py",
        "nn.BatchNorm2d if kind is nn.SyncBatchNorm else kind",
        "kind",
        "tests/test_convert.py -k synchronised",
    ),
    Mutation(
        "resnet_fused/convert.py",
        "if part is not None and part._modules:",
        "if False:",
        "tests/test_untouched.py -k surgery",
    ),
    Mutation(
        "resnet_fused/convert.py",
        "    except BaseException:",
        "    except Exception:",
        "tests/test_untouched.py -k interrupt",
    ),
    Mutation(
        "resnet_fused/convert.py",
        "vars(module).update(state)\n        raise",
        "pass\n        raise",
        "tests/test_untouched.py -k interrupt",
    ),
    Mutation(
        "resnet_fused/convert.py",
        " and not functional.hooked(modules[2]) else 2",
        " else 2",
        "tests/test_convert.py -k relu_of_a_sequence",
    ),
    Mutation(
        "resnet_fused/convert.py", "if _kinds(self) != self.kinds:", "if False:", "tests/test_untouched.py -k surgery"
    ),
    Mutation(
        "resnet_fused/recognise.py",
        "vars(twin).update(vars(module), training=training)",
        "vars(twin).update(vars(module))",
        "tests/test_untouched.py -k branches",
    ),
    Mutation(
        "resnet_fused/recognise.py",
        "if isinstance(value, list | tuple) and value and",
        "if False and",
        "tests/test_convert.py -k ones_own",
    ),
    Mutation(
        "resnet_fused/recognise.py",
        "any(now[k] is not v for k, v in attributes.items()):",
        "False:",
        "tests/test_convert.py -k left_alone",
    ),
    Mutation(
        "resnet_fused/recognise.py",
        "if len(projection) != 1 or projection[0].relu:",
        "if len(projection) != 1:",
        "tests/test_convert.py -k left_alone",
    ),
    Mutation(
        "resnet_fused/recognise.py",
        "len(node.args) == 2 and not node.kwargs and",
        "len(node.args) == 2 and",
        "tests/test_convert.py -k left_alone",
    ),
    Mutation(
        "resnet_fused/recognise.py",
        "not node.kwargs and len(node.all_input_nodes) == 2:",
        "not node.kwargs:",
        "tests/test_convert.py -k left_alone",
    ),
    Mutation(
        "resnet_fused/recognise.py",
        "key=lambda path: (_pooled(module, path), -len(path))",
        "key=lambda path: -len(path)",
        "tests/test_convert.py -k ones_own",
    ),
    Mutation(
        "resnet_fused/recognise.py",
        "if layout.residual and width != other:",
        "if False:",
        "tests/test_convert.py -k left_alone",
    ),
    Mutation(
        "resnet_fused/ops.py",
        "z, shortcut, ys = channels_last(z), channels_last(shortcut)",
        "z, shortcut, ys = channels_last(z), shortcut",
        "tests/test_untouched.py -k another_layout",
    ),
    Mutation(
        "resnet_fused/ops.py",
        "stats[i].contiguous(), frozen[i]",
        "stats[i], frozen[i]",
        "tests/test_untouched.py -k another_layout",
    ),
    Mutation(
        "resnet_fused/ops.py",
        "for dtype in (weight_dtype, norm_dtype, norm_dtype)]",
        "for dtype in (norm_dtype, weight_dtype, norm_dtype)]",
        f"{AUTOGRAD} -k opcheck",
    ),
    Mutation(
        "resnet_fused/ops.py",
        "torch.empty_strided(w.shape, strides[4 * i : 4 * i + 4], dtype",
        "torch.empty_strided(w.shape, w.stride(), dtype",
        f"{AUTOGRAD} -k opcheck",
    ),
    Mutation(
        "resnet_fused/autograd.py",
        "if w is not a and w.dtype == a.dtype",
        "if w is not a",
        "tests/test_untouched.py -k filter_that_is_cast",
    ),
    Mutation(
        "resnet_fused/autograd.py", "for t in unit[4:6]]", "for t in unit[5:6]]", "tests/test_untouched.py -k in_place"
    ),
    Mutation(
        "resnet_fused/autograd.py",
        'return torch.empty_like(w, device="meta").stride()',
        "return w.stride()",
        "tests/test_untouched.py -k parameters_layout",
    ),
    Mutation(
        "resnet_fused/autograd.py",
        "x.dtype if gamma is None else gamma.dtype)",
        "x.dtype)",
        f"{AUTOGRAD} -k not_rounded",
    ),
    Mutation(
        "resnet_fused/chain.py", "return None if self.frozen else self.y", "return self.y", f"{AUTOGRAD} -k infinite"
    ),
    Mutation(
        "resnet_fused/chain.py",
        "return dw.as_strided(dw.shape, stride)",
        "return dw",
        "tests/test_untouched.py -k parameters_layout",
    ),
    Mutation(
        "resnet_fused/chain.py",
        "if code[7] < _UNDECIDED:",
        "if code[7] <= _UNDECIDED:",
        "tests/test_plan.py -k undecided",
    ),
    Mutation(
        "resnet_fused/chain.py",
        "x.device, request, **options)\n    return",
        "x.device, request)\n    return",
        "tests/test_plan.py -k undecided",
    ),
    Mutation(
        "resnet_fused/chain.py",
        "self.pointwise and step == other and",
        "self.pointwise and",
        f"{AUTOGRAD} -k 'strides and fp32'",
    ),
    Mutation(
        "resnet_fused/chain.py",
        "self.pointwise and step == other and padding == (0, 0)",
        "self.pointwise and step == other",
        f"{AUTOGRAD} -k 'padded and fp32'",
    ),
]
