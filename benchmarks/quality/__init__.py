# SPDX-License-Identifier: Apache-2.0
"""What compression does to answers: policies x retentions x data sets, on any OpenAI endpoint."""
