"""The Triton kernel of the soft-target losses: loss and gradient of all sources in one launch.

A program takes R rows of one source. A source whose classes fit into a tile is read once and stays in registers; a wider
one is passed over twice, first for the softmax's maximum and sum (online, each column on its own), then for loss and
gradient. Arithmetic is in float32 (``DOUBLE``: float64), whatever is stored.

How the numbers stay exact where a plain formula would not:

* the maximum is subtracted before the division by T: logits of 1e4 keep their small differences;
* a softmax's sum is kept as 1 + rest, the 1 being the largest term: the loss of a confident and right student, about
  ``rest``, survives where ``log(1 + rest)`` would round to 0;
* KL is summed as ``p * (d - 1 + exp(-d))``, d the difference of log-probabilities, which adds ``sum(q - p) = 0`` to the
  usual ``p * d``: no term is negative, so nothing cancels when student and source agree;
* a NaN anywhere in a row reaches the row's loss and gradient.

Where a source's part of a row begins is known only when the kernel runs, so the compiler takes it to begin anywhere and
loads one element at a time. ``WIDE`` (elements of 16 bytes) moves a tile's first column to the multiple of ``WIDE`` before:
elements are then loaded in groups that begin at such multiples, as one load each. A group at a row's end holds elements of
neighbours, which are replaced after loading; such groups of the gradient are stored one element at a time (``EDGES``). All
three tensors' rows must begin equally far from a multiple of ``WIDE`` (kernels/fused.py sees to it).

Shape suffixes: R rows of a tile, N its columns, K entries of a top-k target.
"""

import triton
import triton.language as tl

# forms of the target (constexpr FORM)
LOGITS, PROBABILITIES, TOPK_UNIFORM, TOPK_DROP = 0, 1, 2, 3


@triton.jit
def _log1p(rest_R):
    """log(1 + rest) to full relative accuracy; the GPU's logarithm alone has none near 1."""
    x = rest_R / (2.0 + rest_R)
    xx = x * x
    near = 2.0 * x * (1 + xx * (1 / 3 + xx * (1 / 5 + xx * (1 / 7 + xx * (1 / 9 + xx * (1 / 11 + xx * (1 / 13)))))))
    return tl.where(rest_R < 1.0, near, tl.log(1.0 + rest_R))


@triton.jit
def _stats(x_RN, inv_temp):
    """Maximum of each row, and the sum of ``exp((x - maximum) / T)`` less its largest term."""
    top_R = tl.max(x_RN, axis=1)
    e_RN = tl.exp((x_RN - top_R[:, None]) * inv_temp)
    is_top_RN = x_RN == top_R[:, None]
    rest_R = tl.sum(tl.where(is_top_RN, 0.0, e_RN), axis=1) + (tl.sum(is_top_RN.to(tl.float32), axis=1) - 1.0)
    return top_R, rest_R


@triton.jit
def _add(top_RN, rest_RN, x_RN, inv_temp):
    """One more element for each column's running maximum and rest. No column waits for another: no barrier in the loop.

    Two equal elements may both be -inf: no class so far.
    """
    e_RN = tl.exp(tl.where(x_RN == top_RN, 0.0, -tl.abs(x_RN - top_RN)) * inv_temp)
    rises_RN = x_RN > top_RN
    rest_RN = tl.where(rises_RN, (1.0 + rest_RN) * e_RN, rest_RN + e_RN)
    return tl.where(rises_RN, x_RN, top_RN), rest_RN


@triton.jit
def _joined(top_RN, rest_RN, inv_temp):
    """The columns' maxima and rests as those of the row."""
    top_R = tl.max(top_RN, axis=1)
    is_top_RN = top_RN == top_R[:, None]
    shrunk_RN = (1.0 + rest_RN) * tl.exp((top_RN - top_R[:, None]) * inv_temp)
    rest_R = tl.sum(tl.where(is_top_RN, rest_RN, shrunk_RN), axis=1)
    return top_R, rest_R + (tl.sum(is_top_RN.to(tl.float32), axis=1) - 1.0)


@triton.jit
def _surprise(p, log_p, q, log_q, KD: tl.constexpr):
    """What a class of target probability p adds to the loss; a class of probability 0 adds nothing to cross entropy."""
    if KD:
        d = log_p - log_q
        near = d * d * (0.5 - d * (1 / 6 - d * (1 / 24 - d * (1 / 120 - d * (1 / 720 - d * (1 / 5040 - d / 40320))))))
        return tl.where(p == 0, q, tl.where(tl.abs(d) < 0.5, p * near, p * (d - 1.0) + q))
    else:
        return tl.where(p == 0, 0.0, -p * log_q)


@triton.jit
def _inside(column_N, shift_R, count):
    """Which columns of a tile, whose first is ``shift`` before the row's first class, are classes of the source."""
    return (column_N[None, :] >= shift_R[:, None]) & (column_N[None, :] < (shift_R + count)[:, None])


@triton.jit
def _load(
    x_R, column_N, shift_R, count, ok_R, COMPUTE: tl.constexpr, PROBABILITY: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """A tile of logits from the addresses where the tile's rows begin, -inf outside; of probabilities, their logarithms."""
    OTHER: tl.constexpr = 0.0 if PROBABILITY else float("-inf")
    x_RN = x_R[:, None] + column_N[None, :]
    inside_RN = ok_R[:, None] & _inside(column_N, shift_R, count)
    if WIDE > 1:
        group_N = column_N // WIDE * WIDE
        touched_RN = ok_R[:, None] & (group_N[None, :] < (shift_R + count)[:, None])
        value_RN = tl.load(x_RN, mask=touched_RN, other=OTHER).to(COMPUTE)
        value_RN = tl.where(inside_RN, value_RN, OTHER)
    else:
        value_RN = tl.load(x_RN, mask=inside_RN, other=OTHER).to(COMPUTE)
    return tl.log(value_RN) if PROBABILITY else value_RN


@triton.jit
def _store(x_R, column_N, shift_R, count, in_batch_R, value_RN, WIDE: tl.constexpr, EDGES: tl.constexpr):
    """A tile's classes; groups that are not wholly classes one by one."""
    x_RN = x_R[:, None] + column_N[None, :]
    inside_RN = in_batch_R[:, None] & _inside(column_N, shift_R, count)
    if WIDE > 1:
        group_N = column_N // WIDE * WIDE
        end_R = shift_R + count
        whole_RN = (group_N[None, :] >= shift_R[:, None]) & ((group_N + WIDE)[None, :] <= end_R[:, None])
        whole_RN = whole_RN & in_batch_R[:, None]
        tl.store(x_RN, value_RN, mask=whole_RN)
        if EDGES:
            tl.store(x_RN, value_RN, mask=inside_RN & (whole_RN == 0))
    else:
        tl.store(x_RN, value_RN, mask=inside_RN)


@triton.jit
def _tile(
    student, student_stride, target, target_stride, index, index_stride, weight, grad, grad_stride,
    first, count, k_first, k_count, inv_temp, loss_scale, grad_scale, block, rows,
    KD: tl.constexpr, FORM: tl.constexpr, WEIGHTED: tl.constexpr, LOSS: tl.constexpr, GRAD: tl.constexpr,
    COMPUTE: tl.constexpr, R: tl.constexpr, N: tl.constexpr, K: tl.constexpr, LOOP: tl.constexpr,
    WIDE: tl.constexpr, EDGES: tl.constexpr,
):  # fmt: skip
    """R rows of one source: writes their gradient, returns the sum of their losses."""
    TOPK: tl.constexpr = FORM >= 2
    row_R = (block * R + tl.arange(0, R)).to(tl.int64)
    in_batch_R = row_R < rows
    ok_R = in_batch_R
    if WEIGHTED:
        weight_R = tl.load(weight + row_R, mask=in_batch_R, other=0).to(COMPUTE)
        ok_R = in_batch_R & (weight_R != 0)
        loss_scale_R = loss_scale * weight_R
        grad_scale_R = grad_scale * weight_R
    else:
        loss_scale_R = tl.zeros([R], COMPUTE) + loss_scale
        grad_scale_R = tl.zeros([R], COMPUTE) + grad_scale
    column_N = tl.arange(0, N)
    student_R = student + row_R * student_stride + first
    grad_R = grad + row_R * grad_stride + first
    shift_R = tl.zeros([R], tl.int32)
    if WIDE > 1:
        student_at_R, target_at_R = row_R * student_stride + first, row_R * target_stride + first
        grad_at_R = row_R * grad_stride + first
        if EDGES:
            shift_R = (student_at_R % WIDE).to(tl.int32)
        # a multiple, as the compiler can see
        student_tile_R = student + student_at_R // WIDE * WIDE
        target_tile_R = target + target_at_R // WIDE * WIDE
        grad_tile_R = grad + grad_at_R // WIDE * WIDE
    else:
        student_tile_R, target_tile_R = student_R, target + row_R * target_stride + first
        grad_tile_R = grad_R
    span = count
    if EDGES:
        span = count + tl.max(shift_R, axis=0)

    # maximum and sum of each row
    s_RN = _load(student_tile_R, column_N, shift_R, count, ok_R, COMPUTE, False, WIDE)
    if not TOPK:
        t_RN = _load(target_tile_R, column_N, shift_R, count, ok_R, COMPUTE, FORM == 1, WIDE)
    if LOOP:
        s_top_RN, s_rest_RN = s_RN, tl.zeros([R, N], COMPUTE)
        if not TOPK:
            t_top_RN, t_rest_RN = t_RN, tl.zeros([R, N], COMPUTE)
        for start in range(N, span, N):
            more_N = start + column_N
            x_RN = _load(student_tile_R, more_N, shift_R, count, ok_R, COMPUTE, False, WIDE)
            s_top_RN, s_rest_RN = _add(s_top_RN, s_rest_RN, x_RN, inv_temp)
            if not TOPK:
                y_RN = _load(target_tile_R, more_N, shift_R, count, ok_R, COMPUTE, FORM == 1, WIDE)
                t_top_RN, t_rest_RN = _add(t_top_RN, t_rest_RN, y_RN, inv_temp)
        s_top_R, s_rest_R = _joined(s_top_RN, s_rest_RN, inv_temp)
        if not TOPK:
            t_top_R, t_rest_R = _joined(t_top_RN, t_rest_RN, inv_temp)
    else:
        s_top_R, s_rest_R = _stats(s_RN, inv_temp)
        if not TOPK:
            t_top_R, t_rest_R = _stats(t_RN, inv_temp)
    s_log_R = _log1p(s_rest_R)
    if TOPK:
        # the tempered and normalised target: p_RK of the k classes, other_R of each of the rest
        k_K = tl.arange(0, K)
        in_k_RK = ok_R[:, None] & (k_K < k_count)[None, :]
        class_RK = tl.load(index + row_R[:, None] * index_stride + (k_first + k_K)[None, :], mask=in_k_RK, other=0)
        class_RK = class_RK.to(tl.int64)
        inside_RK = (class_RK >= 0) & (class_RK < count)
        wrong_R = tl.sum((in_k_RK & (inside_RK == 0)).to(tl.int32), axis=1) > 0
        grad_scale_R = tl.where(wrong_R, float("nan"), grad_scale_R)
        loss_scale_R = tl.where(wrong_R, float("nan"), loss_scale_R)
        k_mask_RK = in_k_RK & inside_RK
        v_at_RK = row_R[:, None] * target_stride + (k_first + k_K)[None, :]
        v_RK = tl.load(target + v_at_RK, mask=in_k_RK, other=0.0).to(COMPUTE)
        y_RK = tl.log(v_RK)
        y_top_R = tl.max(y_RK, axis=1)
        others = (count - k_count).to(COMPUTE)
        if FORM == 2:
            left_R = 1.0 - tl.sum(v_RK, axis=1)
            left_R = tl.where(left_R < 0, 0.0, left_R) / tl.where(others > 0, others, 1.0)
            left_R = tl.where(others > 0, left_R, 0.0)
            y_other_R = tl.log(left_R)
            y_top_R = tl.where(y_other_R > y_top_R, y_other_R, y_top_R)
            o_R = tl.exp((y_other_R - y_top_R) * inv_temp)
        else:
            y_other_R = tl.zeros([R], COMPUTE) + float("-inf")
            o_R = tl.zeros([R], COMPUTE)
        u_RK = tl.exp((y_RK - y_top_R[:, None]) * inv_temp)
        total_R = tl.sum(tl.where(in_k_RK, u_RK, 0.0), axis=1) + others * o_R
        p_RK = u_RK / total_R[:, None]
        other_R = o_R / total_R
        log_total_R = tl.log(total_R)
        log_p_RK = (y_RK - y_top_R[:, None]) * inv_temp - log_total_R[:, None]
        log_other_R = (y_other_R - y_top_R) * inv_temp - log_total_R
        s_RK = tl.load(student_R[:, None] + class_RK, mask=k_mask_RK, other=float("-inf")).to(COMPUTE)
        log_q_RK = (s_RK - s_top_R[:, None]) * inv_temp - s_log_R[:, None]
        q_RK = tl.exp((s_RK - s_top_R[:, None]) * inv_temp) / (1.0 + s_rest_R)[:, None]
    else:
        t_log_R = _log1p(t_rest_R)
        t_inv_R = 1.0 / (1.0 + t_rest_R)
    s_inv_R = 1.0 / (1.0 + s_rest_R)

    # loss and gradient
    loss_RN = tl.zeros([R, N], COMPUTE)
    infinite_RN = tl.zeros([R, N], COMPUTE)
    for start in range(0, span if LOOP else 1, N):
        c_N = start + column_N
        if LOOP:
            s_RN = _load(student_tile_R, c_N, shift_R, count, ok_R, COMPUTE, False, WIDE)
            if not TOPK:
                t_RN = _load(target_tile_R, c_N, shift_R, count, ok_R, COMPUTE, FORM == 1, WIDE)
        d_RN = (s_RN - s_top_R[:, None]) * inv_temp
        q_RN = tl.exp(d_RN) * s_inv_R[:, None]
        log_q_RN = d_RN - s_log_R[:, None]
        if TOPK:
            p_RN = tl.zeros([R, N], COMPUTE) + other_R[:, None]
            log_p_RN = tl.zeros([R, N], COMPUTE) + log_other_R[:, None]
        else:
            d_RN = (t_RN - t_top_R[:, None]) * inv_temp
            p_RN = tl.exp(d_RN) * t_inv_R[:, None]
            log_p_RN = d_RN - t_log_R[:, None]
        if LOSS:
            inside_RN = _inside(c_N, shift_R, count)
            add_RN = tl.where(inside_RN, _surprise(p_RN, log_p_RN, q_RN, log_q_RN, KD), 0.0)
            if TOPK:  # infinite terms are counted, since those of the k classes are taken out again
                is_infinite_RN = add_RN == float("inf")
                infinite_RN += is_infinite_RN.to(COMPUTE)
                add_RN = tl.where(is_infinite_RN, 0.0, add_RN)
            loss_RN += add_RN
        if GRAD:
            g_RN = tl.where(ok_R[:, None], (q_RN - p_RN) * grad_scale_R[:, None], 0.0)
            g_RN = g_RN.to(grad.dtype.element_ty)
            _store(grad_tile_R, c_N, shift_R, count, in_batch_R, g_RN, WIDE, EDGES)
    loss_R = tl.sum(loss_RN, axis=1)
    if TOPK:
        if LOSS:
            infinite_R = tl.sum(infinite_RN, axis=1)
            plain_RK = _surprise(
                tl.zeros_like(p_RK) + other_R[:, None], tl.zeros_like(p_RK) + log_other_R[:, None], q_RK, log_q_RK, KD
            )
            plain_RK = tl.where(k_mask_RK, plain_RK, 0.0)
            is_infinite_RK = plain_RK == float("inf")
            infinite_R -= tl.sum(is_infinite_RK.to(COMPUTE), axis=1)
            loss_R -= tl.sum(tl.where(is_infinite_RK, 0.0, plain_RK), axis=1)
            loss_R += tl.sum(tl.where(k_mask_RK, _surprise(p_RK, log_p_RK, q_RK, log_q_RK, KD), 0.0), axis=1)
            loss_R = tl.where(infinite_R > 0.5, float("inf"), loss_R)
        if GRAD:
            tl.debug_barrier()  # the k classes are written again, by other threads
            g_RK = (q_RK - p_RK) * grad_scale_R[:, None]
            tl.store(grad_R[:, None] + class_RK, g_RK.to(grad.dtype.element_ty), mask=k_mask_RK)
    return tl.sum(tl.where(ok_R, loss_R * loss_scale_R, 0.0), axis=0)


@triton.jit
def soft_target_kernel(
    student, target, index, weight, weight_sum, grad, partial_loss,
    ints, floats, upstream_M, used_M, remembered_M,
    rows, student_stride, target_stride, index_stride, grad_stride, upstream_stride,
    KD: tl.constexpr, FORM: tl.constexpr, WEIGHTED: tl.constexpr, LOSS: tl.constexpr, GRAD: tl.constexpr,
    CHECK: tl.constexpr, KEEP: tl.constexpr, REMEMBER: tl.constexpr, DOUBLE: tl.constexpr,
    R: tl.constexpr, N: tl.constexpr, R_SMALL: tl.constexpr, N_SMALL: tl.constexpr, K: tl.constexpr, LOOP: tl.constexpr,
    WIDE: tl.constexpr, EDGES: tl.constexpr,
):  # fmt: skip
    """Grid: (row tiles of R, sources). Sources of at most N_SMALL classes take R_SMALL rows at a time instead.

    Forward: writes ``partial_loss[source, tile]`` and the gradient for an upstream gradient of ``upstream_M``, which it
    copies to ``used_M`` (``KEEP``). Backward (``CHECK``): where ``upstream_M`` is what the forward used, the gradient is already
    right and nothing is touched; else it is computed anew. ``REMEMBER`` keeps it for the next forward.
    """
    COMPUTE: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    block = tl.program_id(0)
    m = tl.program_id(1)
    sources = tl.num_programs(1)
    first = tl.load(ints + m)
    count = tl.load(ints + m + 1) - first
    k_first = tl.load(ints + sources + 1 + m)
    k_count = tl.load(ints + sources + 2 + m) - k_first
    temp = tl.load(floats + m).to(COMPUTE)
    divisor = tl.load(floats + sources + m).to(COMPUTE)
    upstream = tl.load(upstream_M + m * upstream_stride).to(COMPUTE)
    todo = True
    if CHECK:
        todo = upstream != tl.load(used_M + m).to(COMPUTE)
    if block == 0:
        if KEEP:
            tl.store(used_M + m, upstream)
        if REMEMBER:
            tl.store(remembered_M + m, upstream)
    if todo:
        if WEIGHTED:
            total = tl.load(weight_sum).to(COMPUTE)
            share = tl.where(total == 0, 0.0, 1.0 / total)
        else:
            share = tl.full([], 1.0, COMPUTE) / rows
        share = share / divisor
        loss_scale = share * temp * temp
        grad_scale = share * temp * upstream
        inv_temp = 1.0 / temp
        loss = inv_temp * 0.0
        if N_SMALL < N:
            if count + (WIDE - 1 if EDGES else 0) <= N_SMALL:
                if block * R_SMALL < rows:
                    loss = _tile(
                        student, student_stride, target, target_stride, index, index_stride, weight, grad, grad_stride,
                        first, count, k_first, k_count, inv_temp, loss_scale, grad_scale, block, rows,
                        KD, FORM, WEIGHTED, LOSS, GRAD, COMPUTE, R_SMALL, N_SMALL, K, False, WIDE, EDGES,
                    )  # fmt: skip
            else:
                loss = _tile(
                    student, student_stride, target, target_stride, index, index_stride, weight, grad, grad_stride,
                    first, count, k_first, k_count, inv_temp, loss_scale, grad_scale, block, rows,
                    KD, FORM, WEIGHTED, LOSS, GRAD, COMPUTE, R, N, K, LOOP, WIDE, EDGES,
                )  # fmt: skip
        else:
            loss = _tile(
                student, student_stride, target, target_stride, index, index_stride, weight, grad, grad_stride,
                first, count, k_first, k_count, inv_temp, loss_scale, grad_scale, block, rows,
                KD, FORM, WEIGHTED, LOSS, GRAD, COMPUTE, R, N, K, LOOP, WIDE, EDGES,
            )  # fmt: skip
        if LOSS:
            tl.store(partial_loss + m * tl.num_programs(0) + block, loss)
