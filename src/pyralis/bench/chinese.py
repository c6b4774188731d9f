"""The generated tables of docs/performance.md in Chinese: their headings, captions and ops, never their figures.

Names of peers and variants, which the text of the page quotes, stay as they are.
"""

from __future__ import annotations

import re

# In this order: the longer before what it contains.
PHRASES: tuple[tuple[str, str], ...] = (
    (r"; copy ([\d.]+ TB/s) and matmul (\d+ TFLOP/s) in the same run; ", r"；同一次运行中测得复制 \1、矩阵乘 \2；"),
    (r", matmul (\d+ TFLOP/s); ", r"，矩阵乘 \1；"),
    (r"\. Medians of (\d+) steps: ", r"。\1 步的中位数："),
    (r"forward, loss, backward, 8-bit AdamW; random weights", "前向、损失、反向、8 比特 AdamW；随机权重"),
    (r", LoRA dropout ([\d.]+)\.$", r"，LoRA dropout \1。"),
    (r", (\w+), rank (\d+); ", r"，\1，秩 \2；"),
    (r"(?<=TFLOP/s；)(.*)\.$", r"\1。"),
    (r"^\| op \| model \| tokens \|", "| 算子 | 模型 | token |"),
    (r"\| Pyralis, us \| of the roofline \|", "| Pyralis，us | 达到 roofline 的 |"),
    (r"^\| tokens \| peer \| keeps \|", "| token | 对照 | 保留 |"),
    (r"\| ms \| CPU ms \| tokens/s \|", "| 毫秒 | CPU 毫秒 | token/s |"),
    (r"\| peak GiB \| reserved GiB \|", "| 峰值 GiB | 预留 GiB |"),
    (r"\| kernels \| busy ms \| first losses \|", "| 内核数 | 忙碌毫秒 | 最初的损失 |"),
    (r"\| a launch each \|", "| 逐个启动 |"),
    (r", forward and backward \|", "，前向和反向 |"),
    (r", forward \|", "，前向 |"),
    (r", backward \|", "，反向 |"),
    (r", backward, trained \|", "，反向，参与训练 |"),
    (r"\| nf4, one matrix \|", "| nf4，一个矩阵 |"),
    (r"\| nf4, layer with B r=(\d+) \|", r"| nf4，一层，含秩 \1 的 B |"),
    (r"\| rms_norm \+ residual", "| rms_norm + 残差"),
    (r"\| embedding from host memory \|", "| embedding，从主机内存读取 |"),
    (r", frozen head \|", "，冻结的输出头 |"),
    (r", trained head \|", "，参与训练的输出头 |"),
    (r", both ways in place \|", "，前向和反向，原地 |"),
    (r"\| attention rows", "| 注意力，整行"),
    (r"\| attention packed", "| 注意力，打包"),
    (r"\| gradient norm \|", "| 梯度范数 |"),
    (r"\| adamw, (\d+)-bit states \|", r"| adamw，\1 比特状态 |"),
    (r"\| adamw, 8-bit, bf16 copy \|", "| adamw，8 比特状态，bf16 副本 |"),
    (r"\| supervised tokens/s \| ms \|", "| 监督 token/s | 毫秒 |"),
    (r"\| padding computed \|", "| 计算填充 |"),
    (r"\| padding removed, lengths from the collator \|", "| 去掉填充，长度由 collator 给出 |"),
    (r"\| rank \| backward, apart \|", "| 秩 | 反向，分开 |"),
    (r"\| one kernel \| forward, apart \| one kernel \|", "| 一个内核 | 前向，分开 | 一个内核 |"),
    (r"^\| rows x tokens \| what is kept \| dropout \| ms \|", "| 行 x token | 保留什么 | dropout | 毫秒 |"),
    (r"\| what is kept \| ms \| predicted \| peak, GiB \|", "| 保留什么 | 毫秒 | 预测 | 峰值，GiB |"),
    (r"\| predicted \| reserved \|$", "| 预测 | 预留 |"),
    (r"^\| rows x tokens \| 保留什么", "| 行 x token | 保留什么"),
    (r"\| peak, GiB \|", "| 峰值，GiB |"),
    (r", the MLP (\d+) tokens at a time \|", r"，MLP 每次 \1 个 token |"),
    (r", matrices one after another", "，矩阵逐个生成"),
    (r"\| each layer's input, in host memory", "| 每一层的输入，放在主机内存"),
    (r", the embedding too", "，嵌入也是"),
    (r"\| everything, and the dequantised weights \|", "| 全部，以及反量化的权重 |"),
    (r"\| everything \|", "| 全部 |"),
    (r"\| all but the cheap parts \|", "| 除低代价的部分以外全部 |"),
    (r"\| each layer's input \|", "| 每一层的输入 |"),
)  # fmt: skip


def in_chinese(table: str) -> str:
    """A generated Markdown table with its words in Chinese; what has no phrase here (names of ops, versions) stays."""
    for phrase, chinese in PHRASES:
        table = re.sub(phrase, chinese, table, flags=re.MULTILINE)
    return table
