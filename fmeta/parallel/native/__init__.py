"""Kernels for a CPU, generated as C++ with one loop over tasks.

A traced graph says what happens to all tasks at once, tensor by tensor. On a CPU it is faster to take one task
through the whole graph, while everything it computes stays in the first caches, and then the next; threads take
different tasks. So the graph is read along its task axis (``axis``), lowered to loops over the numbers of a single
task (``lower``, ``pointwise``, ``products``, ``pooling``), loops that visit the same indices are joined
(``schedule``), and all is written as C++ (``emit``) that leans on a few templates (``runtime.h``) and includes
nothing of torch, so that compilers take about a second. One kernel serves any number of tasks.

A graph that holds an operation which is not known here is refused, and inductor compiles it.
"""
