"""Graphs that mix images by statistics, chance, control flow, or what tells slots and batch sizes apart.

In each, the node named `culprit` is the first whose result is not a function of one image.
"""

from proof_cases.graphs import NORM, Case

NOISY = """<opset_import: ["": 17], domain: "local">
           noisy (a) => (b) { [culprit] r = RandomNormalLike(a)  b = Add(a, r) }"""

CASES = {
    "BatchNormalization in training mode": Case(
        "[culprit] y, rm, rv = BatchNormalization<training_mode = 1>(x, s, b, m, v)",
        constants=NORM,
    ),
    "BatchNormalization with the extra outputs of training": Case(
        "[culprit] y, rm, rv, sm, sv = BatchNormalization(x, s, b, m, v)",
        constants=NORM,
        opsets=(9,),
        runs=False,
    ),
    "BatchNormalization with is_test = 0": Case(
        "[culprit] y = BatchNormalization<is_test = 0>(x, s, b, m, v)",
        constants=NORM,
        opsets=(6,),
        runs=False,
    ),
    "BatchNormalization of opset 6 without is_test": Case(
        "[culprit] y = BatchNormalization(x, s, b, m, v)",
        constants=NORM,
        opsets=(6,),
        runs=False,
    ),
    "batch statistics written out": Case(
        """[culprit] mean = ReduceMean<axes = [0, 2, 3]>(x)  centred = Sub(x, mean)
           square = Mul(centred, centred)  variance = ReduceMean<axes = [0, 2, 3]>(square)
           deviation = Sqrt(variance)  y = Div(centred, deviation)""",
    ),
    "batch statistics with axes as an input": Case(
        "[culprit] mean = ReduceMean(x, axes)  y = Sub(x, mean)",
        constants="int64[1] axes = {-4}",
        opsets=(18,),
    ),
    "DynamicQuantizeLinear": Case(
        "[culprit] q, scale, zero = DynamicQuantizeLinear(x)  y = DequantizeLinear(q, scale, zero)",
    ),
    "DynamicQuantizeMatMul": Case(
        "[culprit] y = com.microsoft.DynamicQuantizeMatMul(x, w, ws)",
        constants="uint8[4, 1] w = {1, 2, 3, 4}, float[1] ws = {0.1}",
    ),
    "Softmax over the batch": Case("[culprit] y = Softmax<axis = 0>(x)"),
    "LogSoftmax over the batch, counted from the end": Case("[culprit] y = LogSoftmax<axis = -4>(x)"),
    "Softmax that flattens from the batch on": Case("[culprit] y = Softmax<axis = 0>(x)", opsets=(11,)),
    "Softmax of the default axis on a turned tensor": Case(
        """t = Transpose<perm = [1, 0, 2, 3]>(x)  [culprit] s = Softmax(t)
           y = Transpose<perm = [1, 0, 2, 3]>(s)""",
        opsets=(11,),
    ),
    "Hardmax over the batch": Case("[culprit] y = Hardmax<axis = 0>(x)"),
    "ReduceMax over everything": Case("[culprit] top = ReduceMax(x)  y = Div(x, top)"),
    "ReduceSum with empty axes": Case(
        "[culprit] total = ReduceSum(x, none)  y = Mul(x, total)",
        constants="int64[0] none = {}",
    ),
    "ReduceL2 over the batch": Case("[culprit] norm = ReduceL2<axes = [0]>(x)  y = Div(x, norm)"),
    "ArgMax over the batch, by default": Case(
        "[culprit] best = ArgMax(x)  f = Cast<to = 1>(best)  y = Add(x, f)",
    ),
    "CumSum along the batch": Case("[culprit] y = CumSum(x, zero)", constants="int64 zero = {0}"),
    "TopK along the batch": Case(
        "s = Shape(x)  n = Gather(s, zero)  [culprit] y, places = TopK<axis = 0>(x, n)",
        constants="int64[1] zero = {0}",
    ),
    "InstanceNormalization with the batch as positions": Case(
        """t = Transpose<perm = [1, 2, 0, 3]>(x)  [culprit] i = InstanceNormalization(t, s, b)
           y = Transpose<perm = [2, 0, 1, 3]>(i)""",
        constants=NORM,
    ),
    "LayerNormalization over everything": Case(
        """t = Transpose<perm = [1, 2, 3, 0]>(x)  [culprit] n = LayerNormalization(t, one)
           y = Transpose<perm = [3, 0, 1, 2]>(n)""",
        constants="float[1] one = {1}",
        runs=False,
    ),
    "LpNormalization along the batch": Case("[culprit] y = LpNormalization<axis = 0>(x)"),
    "GroupNormalization with the batch as channels": Case(
        """t = Transpose<perm = [1, 0, 2, 3]>(x)
           [culprit] y = GroupNormalization<num_groups = 2>(t, s, b)""",
        constants=NORM,
        opsets=(21,),
        runs=False,
    ),
    "MeanVarianceNormalization, by default": Case("[culprit] y = MeanVarianceNormalization(x)"),
    "RandomNormalLike": Case("[culprit] r = RandomNormalLike(x)  y = Add(x, r)"),
    "RandomUniform": Case("[culprit] r = RandomUniform<shape = [1, 4, 4, 4]>()  y = Add(x, r)"),
    "RandomNormal with a seed": Case(
        "[culprit] r = RandomNormal<shape = [1, 4, 4, 4], seed = 1.0>()  y = Add(x, r)",
    ),
    "RandomUniformLike": Case("[culprit] r = RandomUniformLike(x)  y = Add(x, r)"),
    "Bernoulli": Case("p = Sigmoid(x)  [culprit] y = Bernoulli(p)"),
    "Multinomial": Case("f = Flatten(x)  [culprit] m = Multinomial<sample_size = 8>(f)  y = Cast<to = 1>(m)"),
    "Dropout in training mode": Case(
        "[culprit] y = Dropout(x, ratio, yes)",
        constants="float ratio = {0.5}, bool yes = {1}",
    ),
    "Dropout of opset 6 without is_test": Case("[culprit] y = Dropout(x)", opsets=(6,), runs=False),
    "If on the images": Case(
        """top = ReduceMax<keepdims = 0, axes = [1, 2, 3]>(x)
           [culprit] first = Gather<axis = 0>(top, zero)
           yes = Greater(first, one)
           y = If (yes) <then_branch = t () => (float p) { p = Relu(x) },
           else_branch = e () => (float q) { q = Neg(x) }>""",
        constants="int64 zero = {0}, float one = {5}",
    ),
    "If on a condition made of images": Case(
        """flat = Flatten<axis = 1>(x)
           top = ReduceMax<keepdims = 0, axes = [1]>(flat)
           many = Greater(top, one)
           [culprit] y = If (many) <then_branch = t () => (float p) { p = Relu(x) },
           else_branch = e () => (float q) { q = Neg(x) }>""",
        constants="float one = {1.5}",
        runs=False,
    ),
    "If on the batch size": Case(
        """s = Shape(x)
           n = Gather(s, zero)
           alone = Equal(n, one)
           [culprit] y = If (alone) <then_branch = t () => (float p) { p = Relu(x) },
           else_branch = e () => (float q) { q = Neg(x) }>""",
        constants="int64 zero = {0}, int64 one = {1}",
    ),
    "Loop as often as there are images": Case(
        """s = Shape(x)
           n = Gather(s, zero)
           [culprit] y = Loop (n, yes, x) <body = b (int64 i, bool c, float a) => (bool d, float e)
           { d = Identity(c)  e = Add(a, a) }>""",
        constants="int64 zero = {0}, bool yes = {1}",
    ),
    "Loop until the images say stop": Case(
        """[culprit] y = Loop (, yes, x) <body = b (int64 i, bool c, float a) => (bool d, float e)
           { top = ReduceMax<keepdims = 0, axes = [1, 2, 3]>(a)
           d = Less(top, bound)
           e = Add(a, a) }>""",
        constants="bool yes = {1}, float bound = {100}",
        runs=False,
    ),
    "a constant for each slot": Case(
        "[culprit] y = Add(x, c)",
        constants="float[4, 1, 1, 1] c = {1, 2, 3, 4}",
    ),
    "a scale for each slot": Case(
        "q = QuantizeLinear(x, one, zero)  [culprit] y = DequantizeLinear<axis = 0>(q, c)",
        constants="float one = {0.1}, uint8 zero = {128}, float[4] c = {1, 2, 3, 4}",
    ),
    "Range over the batch": Case(
        """s = Shape(x)  n = Gather(s, zero)  r = Range(zero, n, one)  [culprit] f = Cast<to = 1>(r)
           u = Unsqueeze(f, axes)  y = Add(x, u)""",
        constants="int64 zero = {0}, int64 one = {1}, int64[3] axes = {1, 2, 3}",
    ),
    "Range from one over the batch": Case(
        """s = Shape(x)  n = Gather(s, zero)  [culprit] r = Range(one, n, one)
           y = Gather<axis = 0>(x, r)""",
        constants="int64 zero = {0}, int64 one = {1}",
    ),
    "slot numbers that address other images": Case(
        """s = Shape(x)  n = Gather(s, zero)  r = Range(zero, n, one)  stride = Mul(r, row)
           u = Unsqueeze(stride, axes)  address = Add(u, offsets)  flat = Reshape(x, all)
           [culprit] y = Gather<axis = 0>(flat, address)""",
        constants="""int64 zero = {0}, int64 one = {1}, int64 row = {63}, int64[1] all = {-1},
           int64[1] axes = {1}, int64[1, 4] offsets = {0, 1, 2, 3}""",
    ),
    "division by the batch size": Case(
        "s = Shape(x)  n = Gather(s, zero)  f = Cast<to = 1>(n)  [culprit] y = Div(x, f)",
        constants="int64 zero = {0}",
    ),
    "multiplication with the number of elements": Case(
        "s = Size(x)  f = Cast<to = 1>(s)  [culprit] y = Mul(x, f)",
    ),
    "square root of the batch size": Case(
        "s = Shape(x)  n = Gather(s, zero)  f = Cast<to = 1>(n)  [culprit] r = Sqrt(f)  y = Mul(x, r)",
        constants="int64 zero = {0}",
    ),
    "a mask of random numbers in a local function": Case(
        "[outer] y = local.noisy(x)",
        functions=NOISY,
        runs=False,
    ),
}
