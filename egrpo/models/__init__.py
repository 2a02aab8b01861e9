"Diffusers pipelines as policies, and what is recorded inside of them."
