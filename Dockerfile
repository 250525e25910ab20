# docker build -t dom2 .          (for a CPU alone: --build-arg INDEX=https://download.pytorch.org/whl/cpu, much smaller)
# mkdir -p datasets runs
# docker run --rm -v ./datasets:/dom2/datasets -v ./runs:/dom2/runs dom2 dom2_mpe.py --scenario simple_tag
FROM python:3.11-slim
ARG INDEX=https://pypi.org/simple
WORKDIR /dom2
COPY requirements.txt .
RUN pip install --no-cache-dir --extra-index-url "$INDEX" -r requirements.txt
COPY . .
RUN useradd --uid 1000 --create-home user && mkdir -p datasets runs && chown -R user /dom2
USER user
ENTRYPOINT ["python"]
CMD ["dom2_mpe.py", "--help"]
