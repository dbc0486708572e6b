"""`sllm-node`: start a node, and the verbs that people have in their fingers."""
