"""The "Spectra" tab of TensorBoard: measured spectra beside their laws, step by step.

TensorBoard finds the tab by its entry point, `torch_rmt_tensorboard`; there is nothing to call. What the tab shows is
written by `torch_rmt.sinks.TensorBoardSink`, as one JSON text a report and step. This package reads event files only,
and imports nothing of ours.
"""
