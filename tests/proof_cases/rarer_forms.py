"""Graphs that keep images apart by rarer operators: ONNX Runtime's own forms, and odd ones of ONNX."""

from proof_cases.graphs import KERNEL, NORM, SCALES, Case, tensor

QUANTIZED = "q = QuantizeLinear(x, a, z)  "

CASES = {
    "FusedConv with an addend": Case(
        'r = Conv(x, w)  y = com.microsoft.FusedConv<activation = "Relu">(x, w, k, r)',
        constants=KERNEL + ", float[2] k = {1, 2}",
    ),
    "QLinearMul by a constant": Case(
        QUANTIZED + "m = com.microsoft.QLinearMul(q, a, z, c, a, z, a, z)  y = DequantizeLinear(m, a, z)",
        constants=SCALES + ", uint8[1, 4, 1, 1] c = {1, 2, 3, 4}",
    ),
    "QLinearConcat": Case(
        QUANTIZED + "m = com.microsoft.QLinearConcat<axis = 1>(a, z, q, a, z, q, a, z)  y = DequantizeLinear(m, a, z)",
        constants=SCALES,
    ),
    "QLinearAveragePool and QLinearSigmoid": Case(
        QUANTIZED
        + """p = com.microsoft.QLinearAveragePool<kernel_shape = [2, 2]>(q, a, z, a, z)
             s = com.microsoft.QLinearSigmoid(p, a, z, a, z)  y = DequantizeLinear(s, a, z)""",
        constants=SCALES,
    ),
    "QGemm": Case(
        QUANTIZED
        + """h = Flatten(q)  g = com.microsoft.QGemm<transB = 0>(h, a, z, w, a, z, c, a, z)
             y = DequantizeLinear(g, a, z)""",
        constants=SCALES + ", uint8[64, 1] w = {" + ", ".join(["129", "120"] * 32) + "}, int32[1] c = {3}",
    ),
    "MatMulIntegerToFloat": Case(
        QUANTIZED + "y = com.microsoft.MatMulIntegerToFloat(q, w, a, e, z, f, bias)",
        constants=SCALES + ", uint8[4, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}, float[2] bias = {1, 2}",
    ),
    "QLinearMatMul": Case(
        QUANTIZED + "m = QLinearMatMul(q, a, z, w, a, z, a, z)  y = DequantizeLinear(m, a, z)",
        constants=SCALES + ", uint8[4, 2] w = {129, 130, 131, 120, 125, 126, 127, 128}",
        opsets=(10, 17, 21),
    ),
    "scales by channel": Case(
        "q = QuantizeLinear<axis = 1>(x, s, t)  y = DequantizeLinear<axis = 1>(q, s, t)",
        constants="float[4] s = {0.1, 0.2, 0.1, 0.3}, uint8[4] t = {128, 127, 126, 125}",
        opsets=(13, 19),
    ),
    "depth to space and back": Case(
        "d = DepthToSpace<blocksize = 2>(x)  y = SpaceToDepth<blocksize = 2>(d)", opsets=(11, 13)
    ),
    "LpPool, GlobalMaxPool, PRelu": Case(
        "p = LpPool<kernel_shape = [2, 2]>(x)  r = PRelu(p, k)  y = GlobalMaxPool(r)",
        constants="float[4, 1, 1] k = {0.1, 0.2, 0.3, 0.4}",
        opsets=(11, 18),
    ),
    "Compress, Trilu, Hardmax within an image": Case(
        "c = Compress<axis = 2>(x, some)  t = Trilu(c)  y = Hardmax<axis = -1>(t)",
        constants="bool[4] some = {1, 0, 1, 1}",
        opsets=(14, 17),
    ),
    "LpNormalization and MeanVarianceNormalization within an image": Case(
        "l = LpNormalization<axis = 1>(x)  y = MeanVarianceNormalization<axes = [1, 2, 3]>(l)", opsets=(13,)
    ),
    "a table looked up by the images": Case(
        """f = Flatten(x)  b = ArgMax<axis = 1, keepdims = 0>(f)  y = Gather<axis = 0>(table, b)""",
        constants=tensor("table", 64, 3),
    ),
    "CastLike reads the type alone": Case(
        "f = Shape(x)  r = Round(x)  i = CastLike(r, f)  y = Cast<to = 1>(i)", opsets=(15, 19)
    ),
    "LayerNormalization with its statistics": Case(
        "n, mean, scale = LayerNormalization<axis = 2>(x, k)  y = Add(n, mean)",
        constants="float[4, 4] k = {1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4}",
    ),
    "a vector times each image's rows": Case("y = MatMul(x, k)", constants="float[4] k = {1, 2, 3, 4}"),
    "a vector times each image's columns": Case("y = MatMul(k, x)", constants="float[4] k = {1, 2, 3, 4}"),
    "Gemm with the images as columns": Case(
        "f = Flatten(x)  g = Gemm<transB = 1>(w, f)  y = Transpose(g)", constants=tensor("w", 3, 64)
    ),
    "Gemm with both turned": Case(
        "f = Flatten(x)  t = Transpose(f)  y = Gemm<transA = 1, transB = 1>(t, w, c)",
        constants=tensor("w", 3, 64) + ", float[1, 3] c = {1, 2, 3}",
        opsets=(9, 13),
    ),
    "BatchNormalization of folded channels": Case(
        """g = Reshape(x, t)  n = BatchNormalization(g, one, nil, nil, one)  y = Reshape(n, u)""",
        constants="""int64[4] t = {-1, 1, 4, 4}, int64[4] u = {-1, 4, 4, 4}, float[1] one = {2},
                     float[1] nil = {0.5}""",
    ),
    "a mask of attention": Case("y = Attention(x, x, x, k)", constants=tensor("k", 4, 4), opsets=(23,)),
    "GroupNormalization and InstanceNormalization in a row": Case(
        "i = InstanceNormalization(x, s, b)  y = GroupNormalization<num_groups = 4>(i, s, b)",
        constants=NORM,
        opsets=(21, 23),
    ),
}
