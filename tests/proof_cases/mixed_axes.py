"""Graphs that mix images by where axes go: joined, split, misread, picked from, padded, summed over.

In each, the node named `culprit` is the first whose result is not a function of one image.
"""

from proof_cases.graphs import Case

CASES = {
    "Concat along the batch": Case(
        "[culprit] c = Concat<axis = 0>(x, x)  y = Slice(c, one, end, zero)",
        constants="int64[1] one = {1}, int64[1] end = {-3}, int64[1] zero = {0}",
    ),
    "Concat with a constant": Case(
        "[culprit] y = Concat<axis = 1>(x, c)",
        constants="float[1, 1, 4, 4] c = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1}",
        runs=False,
    ),
    "Split of the batch": Case(
        "[culprit] a, b = Split<axis = 0>(x)  y = Concat<axis = 0>(b, a)",
        images="float[4,4,4,4] x",
        runs=False,
    ),
    "Reshape that swaps batch and channels": Case(
        "[culprit] r = Reshape(x, to)  y = Transpose<perm = [1, 0, 2, 3]>(r)",
        constants="int64[4] to = {4, -1, 4, 4}",
    ),
    "Reshape of a transposed tensor": Case(
        "s = Shape(x)  t = Transpose<perm = [1, 0, 2, 3]>(x)  [culprit] y = Reshape(t, s)",
    ),
    "Reshape that cuts images": Case(
        "[culprit] y = Reshape(x, to)",
        constants="int64[2] to = {-1, 48}",
        runs=False,
    ),
    "Flatten of everything, then Softmax": Case(
        "f = Flatten<axis = 0>(x)  [culprit] s = Softmax(f)  y = Reshape(s, to)",
        constants="int64[4] to = {-1, 4, 4, 4}",
    ),
    "Transpose, then Conv": Case(
        "t = Transpose<perm = [3, 1, 2, 0]>(x)  [culprit] y = Conv(t, w)",
        constants="float[1, 4, 1, 1] w = {1, 2, 3, 4}",
    ),
    "Transpose at the end": Case("[culprit] y = Transpose<perm = [1, 0, 2, 3]>(x)"),
    "MatMul that sums over the batch": Case(
        "f = Flatten(x)  t = Transpose(f)  [culprit] gram = MatMul(t, f)  y = MatMul(f, gram)",
    ),
    "MatMul of every image with every other": Case(
        "f = Flatten(x)  t = Transpose(f)  [culprit] pairs = MatMul(f, t)  y = MatMul(pairs, f)",
    ),
    "Gemm of every image with every other": Case(
        "f = Flatten(x)  [culprit] pairs = Gemm<transB = 1>(f, f)  y = MatMul(pairs, f)",
    ),
    "Gemm that sums over the batch": Case(
        "f = Flatten(x)  [culprit] g = Gemm<transA = 1>(f, f)  y = MatMul(f, g)",
    ),
    "Einsum that sums over the batch": Case('[culprit] e = Einsum<equation = "nchw->chw">(x)  y = Add(x, e)'),
    "Einsum of every image with every other": Case(
        'f = Flatten(x)  [culprit] e = Einsum<equation = "nc,mc->nm">(f, f)  y = MatMul(e, f)',
    ),
    "broadcast of every image against every other": Case(
        "t = Transpose<perm = [1, 0, 2, 3]>(x)  [culprit] s = Add(x, t)  y = ReduceSum(s, axes)",
        constants="int64[1] axes = {1}",
        runs=False,
    ),
    "Slice that reverses the batch": Case(
        "[culprit] y = Slice(x, last, first, axis, back)",
        constants="""int64[1] last = {-1}, int64[1] first = {-100}, int64[1] axis = {0},
           int64[1] back = {-1}""",
    ),
    "Slice of the first image": Case(
        "[culprit] first = Slice(x, zero, one, zero)  y = Sub(x, first)",
        constants="int64[1] zero = {0}, int64[1] one = {1}",
    ),
    "Slice by attributes": Case(
        "[culprit] first = Slice<axes = [0], starts = [0], ends = [1]>(x)  y = Sub(x, first)",
        opsets=(9,),
    ),
    "Gather of the first image": Case(
        "[culprit] first = Gather<axis = 0>(x, zero)  y = Sub(x, first)",
        constants="int64 zero = {0}",
    ),
    "GatherND of the first image": Case(
        "[culprit] first = GatherND(x, zero)  y = Sub(x, first)",
        constants="int64[1] zero = {0}",
    ),
    "Pad of the batch": Case(
        "[culprit] p = Pad(x, pads)  y = Slice(p, zero, end, zero)",
        constants="int64[8] pads = {1, 0, 0, 0, 0, 0, 0, 0}, int64[1] zero = {0}, int64[1] end = {-1}",
    ),
    "Resize of the batch": Case(
        '[culprit] y = Resize<mode = "nearest">(x, , scales)',
        constants="float[4] scales = {2, 1, 1, 1}",
    ),
    "Upsample of the batch": Case(
        '[culprit] y = Upsample<mode = "nearest">(x, scales)',
        constants="float[4] scales = {2, 1, 1, 1}",
        opsets=(9,),
    ),
    "Tile of the batch": Case("[culprit] y = Tile(x, repeats)", constants="int64[4] repeats = {2, 1, 1, 1}"),
    "NonZero": Case("[culprit] places = NonZero(x)  f = Cast<to = 1>(places)  y = Transpose(f)"),
    "Compress without an axis": Case(
        "[culprit] y = Compress(x, some)",
        constants="bool[4] some = {1, 0, 1, 1}",
    ),
    "Compress along the batch": Case(
        "[culprit] y = Compress<axis = 0>(x, some)",
        constants="bool[4] some = {1, 0, 1, 1}",
    ),
    "Unique": Case("[culprit] y = Unique(x)"),
    "NonMaxSuppression": Case(
        """boxes = Reshape(x, to)  scores = ReduceMax<axes = [2], keepdims = 0>(boxes)
           classes = Unsqueeze(scores, axes)
           [culprit] chosen = NonMaxSuppression(boxes, classes, many)  y = Cast<to = 1>(chosen)""",
        constants="int64[3] to = {-1, 16, 4}, int64[1] axes = {1}, int64[1] many = {1}",
    ),
    "Trilu over the batch": Case(
        """t = Transpose<perm = [1, 2, 0, 3]>(x)  [culprit] u = Trilu(t)
           y = Transpose<perm = [2, 0, 1, 3]>(u)""",
    ),
    "Squeeze of whatever is 1": Case("[culprit] y = Squeeze(x)", images="float[N,1,4,4] x", runs=False),
    "MaxPool whose indices are read": Case(
        """[culprit] p, places = MaxPool<kernel_shape = [2, 2]>(x)  f = Cast<to = 1>(places)
           y = Add(p, f)""",
    ),
}
