"""Data: where it comes from (`sources`), and how it becomes batches on the training device (`batches`)."""
