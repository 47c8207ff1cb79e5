"""The files for `ray up` against Ray's schema and the clouds' own descriptions of a machine.

Nothing here runs on a cloud: EC2 is moto's, which checks requests as Amazon describes them.
"""

from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from cluster.descriptions import check_google_instance
from cluster.files import RAY_UP, read
from ray.autoscaler._private.util import prepare_config, validate_config


@pytest.fixture(params=RAY_UP)
def ray_up(request) -> dict[str, Any]:
    return read(f"ray-up/{request.param}.yaml")


def test_ray_takes_the_cluster_files(ray_up):
    config = prepare_config(ray_up)
    validate_config(config)
    groups = [g for name, g in config["available_node_types"].items() if name != "head"]
    assert config["max_workers"] == sum(group["max_workers"] for group in groups)


@pytest.mark.parametrize(
    "place", [(), ("auth",), ("docker",), ("available_node_types", "reward")], ids=str
)
def test_a_mistake_in_a_cluster_file_is_found(ray_up, place):
    here = ray_up
    for step in place:
        here = here[step]
    here["unheard_of"] = 1
    with pytest.raises(jsonschema.ValidationError, match="unheard_of"):
        validate_config(prepare_config(ray_up))


@pytest.fixture
def ec2(monkeypatch, tmp_path) -> Iterator[Any]:
    """An EC2 in this process, which checks requests against Amazon's own API description."""
    boto3, moto = pytest.importorskip("boto3"), pytest.importorskip("moto")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("HOME", str(tmp_path))  # where the key pair goes
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-2")
    (tmp_path / ".ssh").mkdir()
    with moto.mock_aws():
        boto3.client("iam").create_instance_profile(InstanceProfileName="fifa-ray")
        yield boto3.client("ec2")


def filled_in(config: dict[str, Any], ec2: Any) -> dict[str, Any]:
    """The file with what a user fills in, in moto's world."""
    subnet = ec2.describe_subnets()["Subnets"][0]
    members = ec2.create_security_group(GroupName="x", Description="x", VpcId=subnet["VpcId"])
    for group in config["available_node_types"].values():
        node = group["node_config"] = dict(group["node_config"])
        node["ImageId"] = ec2.describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
        node["SubnetIds"] = [subnet["SubnetId"]]
        node["SecurityGroupIds"] = [members["GroupId"]]
    return config


def test_ray_starts_every_group_on_ec2(ec2):
    from botocore.exceptions import ParamValidationError
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    config = bootstrap_aws(prepare_config(filled_in(read("ray-up/aws.yaml"), ec2)))
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    for name, group in config["available_node_types"].items():
        tags = {"ray-node-type": "worker", "ray-user-node-type": name}
        (node,) = provider.create_node(group["node_config"], tags, 1).values()
        is_spot = group.get("labels", {}).get("ray.io/market-type") == "spot"
        assert node.instance_type == group["node_config"]["InstanceType"]
        assert node.instance_lifecycle == ("spot" if is_spot else None)
        assert node.iam_instance_profile["Arn"].endswith("/fifa-ray")
        assert node.metadata_options["HttpTokens"] == "required"
    wrong = config["available_node_types"]["reward"]["node_config"] | {"InstanceTypes": "x"}
    with pytest.raises(ParamValidationError, match="InstanceTypes"):
        provider.create_node(wrong, tags, 1)


def test_google_knows_every_key_of_its_machines():
    groups = read("ray-up/gcp.yaml")["available_node_types"]
    for group in groups.values():
        check_google_instance(group["node_config"])
    spot = groups["reward-spot"]["node_config"]
    assert spot["scheduling"]["provisioningModel"] == "SPOT"
    for wrong in (
        {"machinesType": "x"},
        {"scheduling": {"provisioningModel": "CHEAP"}},
        {"disks": {}},
    ):
        with pytest.raises(jsonschema.ValidationError):
            check_google_instance(spot | wrong)
