"""What the clouds tell their machines, over real sockets."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from cloudckpt.errors import ConfigError
from cloudckpt.preemption.metadata import AwsSpot, GcpKey, Metadata, aws_watches, gcp_watches
from cloudckpt.preemption.watching import Sighting, Watcher
from tests.preemption.clouds import EC2, ComputeEngine

TERMINATE = json.dumps({"action": "terminate", "time": "2017-09-18T08:22:00Z"})


@pytest.fixture
def ec2() -> Iterator[EC2]:
    """EC2's server."""
    with EC2() as cloud:
        yield cloud


@pytest.fixture
def google() -> Iterator[ComputeEngine]:
    """Compute Engine's server."""
    with ComputeEngine() as cloud:
        yield cloud


def spot(cloud: EC2, *, rebalance: bool = False) -> AwsSpot:
    """What looks at it."""
    return AwsSpot(Metadata(f"http://{cloud.address}/", "ADDRESS"), rebalance=rebalance)


def test_nothing_is_nothing(ec2: EC2) -> None:
    """A spot instance that is not being taken answers 404; one token serves all requests."""
    watch = spot(ec2, rebalance=True)
    assert [*watch.look(), *watch.look()] == []
    assert ec2.requests == [
        ("PUT", "/latest/api/token"),
        *[
            ("GET", "/latest/meta-data/spot/instance-action"),
            ("GET", "/latest/meta-data/events/recommendations/rebalance"),
        ]
        * 2,
    ]


@pytest.mark.parametrize(
    ("time", "notice_s"),
    [
        ("2017-09-18T08:22:00Z", 110.0),
        ("2017-09-18T08:21:00Z", 50.0),
        ("2017-09-18T08:20:05Z", 0.0),
        ("2017-09-18T09:00:00Z", 110.0),
        ("soon", 110.0),
        ("2017-09-18T08:21:00", 110.0),
    ],
)
def test_the_time_is_compared_with_the_servers_own(ec2: EC2, time: str, notice_s: float) -> None:
    """Ten seconds before the end and never more than 110 s; this machine's clock, years later, takes no part."""
    ec2.action = json.dumps({"action": "stop", "time": time})
    (found,) = spot(ec2).look()
    assert found == Sighting(reason=f"EC2 spot instance: stop at {time}", notice_s=notice_s)


@pytest.mark.parametrize("body", ["", "terminate", "[]", "{}", '"x"', '{"action": 3}'])
def test_whatever_it_says_a_notice_is_a_notice(ec2: EC2, body: str) -> None:
    """A body that nobody can read counts as one, with the usual two minutes."""
    ec2.action = body
    (found,) = spot(ec2).look()
    assert found.notice_s == 110.0
    assert found.reason.startswith("EC2 spot instance: ")


def test_a_notice_is_seen_once_and_a_token_renewed(ec2: EC2) -> None:
    """The token runs out between two looks; the same body again is no further notice."""
    watch = spot(ec2)
    assert [*watch.look()] == []
    ec2.token, ec2.action = "second", TERMINATE
    assert len(watch.look()) == 1
    assert [*watch.look()] == []
    assert [path for method, path in ec2.requests if method == "PUT"] == ["/latest/api/token"] * 2


def test_a_rebalance_recommendation_has_no_deadline(ec2: EC2) -> None:
    """It is looked for only where it is asked for."""
    ec2.rebalance = json.dumps({"noticeTime": "2017-09-18T08:10:00Z"})
    assert [*spot(ec2).look()] == []
    assert [*spot(ec2, rebalance=True).look()] == [Sighting(reason="EC2 rebalance recommendation", notice_s=None)]


def test_an_answer_that_means_nothing_is_an_error(ec2: EC2) -> None:
    """And names server, path and status."""
    ec2.status = 503
    with pytest.raises(OSError, match=rf"{ec2.address}/latest/meta-data/spot/instance-action answered 503"):
        spot(ec2).look()


def test_a_notice_is_not_lost_to_trouble_beside_it(ec2: EC2) -> None:
    """In the same look the other path answers nonsense: the notice is seen, and the trouble told by the next look."""
    ec2.action = TERMINATE
    ec2.out_of_order.add("/latest/meta-data/events/recommendations/rebalance")
    watch = spot(ec2, rebalance=True)
    (found,) = watch.look()
    assert found.reason.startswith("EC2 spot instance: terminate")
    with pytest.raises(OSError, match="recommendations/rebalance answered 500"):
        watch.look()


def key(cloud: ComputeEngine, name: str = "preempted", *alarming: str) -> GcpKey:
    """What looks at one value."""
    return GcpKey(Metadata(cloud.address, "ADDRESS"), name, alarming or ("TRUE",), notice_s=25.0)


def test_google_is_asked_once_and_answers_when_something_changes(google: ComputeEngine) -> None:
    """The first request comes back at once, the second one waits until the machine is preempted."""
    watch = key(google)
    assert [*watch.look()] == []
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(watch.look)
        assert google.wait_until_asked(1)
        google.set("preempted", "TRUE")
        assert [*waits.result(30)] == [Sighting(reason="Compute Engine: preempted is TRUE", notice_s=25.0)]
    assert len(google.requests) == 2
    watch.close()


def test_a_notice_that_was_there_before_is_seen_at_once(google: ComputeEngine) -> None:
    """The program was started after it."""
    google.set("preempted", "TRUE")
    assert len(key(google).look()) == 1


def test_a_migration_is_no_end(google: ComputeEngine) -> None:
    """Maintenance that moves the machine while it runs is none of ours; one that ends it is a notice."""
    watch = key(google, "maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")
    google.set("maintenance-event", "MIGRATE_ON_HOST_MAINTENANCE")
    assert [*watch.look()] == []
    google.set("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")
    assert [*watch.look()] == [
        Sighting(reason="Compute Engine: maintenance-event is TERMINATE_ON_HOST_MAINTENANCE", notice_s=25.0)
    ]


def test_whoever_is_not_google_is_not_believed(ec2: EC2) -> None:
    """A server that does not say that it is Google's."""
    watch = GcpKey(Metadata(ec2.address, "ADDRESS"), "preempted", ("TRUE",), notice_s=25.0)
    with pytest.raises(OSError, match="/computeMetadata/v1/instance/preempted answered 401"):
        watch.look()


def test_a_look_that_waits_is_broken_off(google: ComputeEngine) -> None:
    """Closing ends the thread, and says nothing: nobody is interested any more."""
    told: list[object] = []
    watcher = Watcher(key(google), told.append, told.append)
    watcher.start()
    assert google.asked(2)
    assert google.wait_until_asked(1)
    watcher.close()
    assert not watcher._thread.is_alive()
    assert told == []


def test_nobody_there_is_told_once() -> None:
    """On a machine of no cloud: one warning, however often it is looked for."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    watch = AwsSpot(Metadata(f"http://127.0.0.1:{port}", "ADDRESS"), rebalance=False)
    warned, looked = list[str](), threading.Event()
    looks = 0

    def count() -> list[Sighting]:
        nonlocal looks
        looks += 1
        if looks > 3:
            looked.set()
        return list(AwsSpot.look(watch))

    watch.look = count  # type: ignore[method-assign]  # counted on its way
    watch.every_s = 0.01
    watcher = Watcher(watch, lambda _: None, warned.append)
    watcher.start()
    assert looked.wait(30)
    watcher.close()
    (said,) = warned
    assert said.startswith(
        "the metadata service of EC2 (in a container it takes a hop limit of 2) cannot be looked at ("
    )
    assert said.endswith("no notice will be seen there until it can")


def test_addresses_come_from_the_clouds_own_variables(ec2: EC2, google: ComputeEngine) -> None:
    """Those that boto and google-auth read as well; without them it is the link-local address."""
    (found,) = aws_watches({"AWS_EC2_METADATA_SERVICE_ENDPOINT": f"http://{ec2.address}"}, rebalance=False)
    assert [*found.look()] == []
    watches = gcp_watches({"GCE_METADATA_HOST": google.address})
    assert [[*watch.look()] for watch in watches] == [[], []]
    for watch in (*watches, *gcp_watches({}), *aws_watches({}, rebalance=False)):
        watch.close()
    assert Metadata("169.254.169.254", "X").address == "169.254.169.254:80"


@pytest.mark.parametrize("address", ["https://169.254.169.254", "http://", "http://host:port", "ftp://host"])
def test_an_address_that_cannot_be_asked_is_refused(address: str) -> None:
    """Before anything begins, naming the variable."""
    with pytest.raises(ConfigError, match="AWS_EC2_METADATA_SERVICE_ENDPOINT="):
        aws_watches({"AWS_EC2_METADATA_SERVICE_ENDPOINT": address}, rebalance=False)


def test_what_is_forbidden_is_not_asked() -> None:
    """The variable with which AWS's own libraries are kept from it."""
    with pytest.raises(ConfigError, match="AWS_EC2_METADATA_DISABLED=true"):
        aws_watches({"AWS_EC2_METADATA_DISABLED": "true"}, rebalance=False)
